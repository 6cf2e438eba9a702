"""How often one model beats another: win rates under every metric, with intervals, and a page.

    python eval/compare.py --json_a A.json --json_b B.json --label_a a --label_b b
    python eval/compare.py --json base=BASE.json dpo=DPO.json sdpo=SDPO.json

Scores that are on disk are used as they are, without a model; what is missing is computed first.
Writes pair_<metric>.json, summary.json, .csv, .md and report.html to --outdir; for more than two
models a folder for each two of them, and matrix_<metric>.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from sdpo.common.files import write_json, write_text
from sdpo.evaluation.compare.config import CompareConfig, folder_name, parse_args
from sdpo.evaluation.compare.report import write_report
from sdpo.evaluation.compare.results import (
    Comparison,
    Model,
    Study,
    compare_models,
    notes,
    pair_file,
    summary,
)
from sdpo.evaluation.compare.tables import (
    footnotes,
    headline,
    matrix_grid,
    metric_grid,
    summary_csv,
    summary_markdown,
)
from sdpo.evaluation.generate.manifest import Manifest
from sdpo.evaluation.score.scorers import PUBLISHED
from sdpo.evaluation.score.summary import print_grid
from sdpo.evaluation.score.table import ScoreTable, read_scores


def choose_metrics(scorers: Sequence[str], tables: list[ScoreTable]) -> list[str]:
    """Choose --scorers, else those that have scored every image of every model, else the published
    ones."""
    if scorers:
        return list(scorers)
    complete = [table.complete() for table in tables]
    common = [name for name in complete[0] if all(name in names for names in complete)]
    started = {name for table in tables for name in table.columns} - set(common)
    if common and started:
        print(
            f"left out, since not every image of every model has been scored: "
            f"{', '.join(sorted(started))}; --scorers computes what is missing",
            file=sys.stderr,
        )
    rank = {name: i for i, name in enumerate(PUBLISHED)}
    return sorted(common, key=lambda n: (rank.get(n, len(rank)), n)) or list(PUBLISHED)


def load_models(
    config: CompareConfig, manifests: dict[str, Manifest]
) -> tuple[list[Model], list[str]]:
    """Read the models' scores, computing those that are missing; returns the models and the metrics
    they are compared under.

    Raises:
        UserError: scores that cannot be read, or have to be computed and cannot.
    """
    tables = [read_scores(manifest) for manifest in manifests.values()]
    metrics = choose_metrics(config.scoring.scorers, tables)
    options = config.scoring.options(config.cache_dir)
    # Weights that are named may be others than those the scores on disk were made with.
    named = {name.partition(".")[0] for name in options.weights}
    wanted = [m for m in metrics if m in named or any(len(t.missing(m)) for t in tables)]
    if wanted:
        from sdpo.evaluation.score.scoring import score_manifests

        tables = score_manifests(list(manifests.values()), wanted, options)
    return [Model(label, table) for label, table in zip(manifests, tables, strict=True)], metrics


def write_two(comparison: Comparison, noted: list[str], directory: Path) -> dict[str, Any]:
    """Write the pair files and summary.json of two models; returns the summary."""
    directory.mkdir(exist_ok=True)
    for metric in comparison.results:
        name = f"pair_{metric}.json"
        write_json(directory / name, pair_file(comparison, metric, directory))
    value = summary(comparison, noted)
    write_json(directory / "summary.json", value)
    return value


def write_many(study: Study, config: CompareConfig) -> None:
    """Write a folder for each two of the models, the matrices, and a summary.json of all."""
    folders: dict[str, Comparison] = {}
    for number, c in enumerate(study.comparisons):
        name = folder_name(f"{c.a.label}_vs_{c.b.label}")
        folders[name if name not in folders else f"{name}_{number}"] = c
    pairs = {k: write_two(c, study.notes, config.outdir / k) for k, c in folders.items()}
    matrices = [study.matrix(metric) for metric in study.metrics]
    for value in matrices:
        write_json(config.outdir / f"matrix_{value['name']}.json", value)
    whole = {
        "models": {m.label: str(m.table.manifest.path) for m in study.models},
        "align": config.align,
        "ties": config.ties,
        "seed": config.seed,
        "matrices": matrices,
        "pairs": pairs,
        "notes": study.notes,
    }
    write_json(config.outdir / "summary.json", whole)


def main() -> int:
    """Score what is missing, compare, write everything and print a table; returns the exit code."""
    config, manifests = parse_args(sys.argv[1:], __doc__)
    models, metrics = load_models(config, manifests)
    comparisons = [
        compare_models(a, b, metrics, config.align, config.ties, config.seed)
        for a, b in combinations(models, 2)
    ]
    study = Study(models, metrics, comparisons, notes(models, metrics))
    if len(models) == 2:
        write_two(comparisons[0], study.notes, config.outdir)
        print(f"{headline(comparisons[0])}\n")
        print_grid(metric_grid(comparisons[0]))
    else:
        write_many(study, config)
        for metric in metrics:
            print_grid(matrix_grid(study, metric))
            print()
    for line in [line for c in comparisons for line in footnotes(c)]:
        print(f"\n{line}")
    write_text(config.outdir / "summary.csv", summary_csv(comparisons))
    write_text(config.outdir / "summary.md", summary_markdown(study))
    page = config.outdir / "report.html"
    write_report(page, study, inline_images=config.inline_images)
    for note in study.notes:
        print(f"compare.py: note: {note}", file=sys.stderr)
    print(f"\nwrote {page}, summary.json, summary.csv and summary.md")
    return 0

"""How often one model beats another: win rates under every metric, with intervals, and a page.

    python eval/compare.py --json_a A.json --json_b B.json --label_a a --label_b b
    python eval/compare.py --json base=BASE.json dpo=DPO.json sdpo=SDPO.json

Scores that are on disk are used as they are, without a model; what is missing is computed first.
Writes pair_<metric>.json, summary.json, .csv, .md and report.html to --outdir; for more than two
models a folder for each two of them, and matrix_<metric>.json.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from sdpo.common.files import write_json, write_text
from sdpo.evaluation.compare.config import folder_name, parse_args
from sdpo.evaluation.compare.report import write_report
from sdpo.evaluation.compare.results import (
    Comparison,
    Model,
    compare_models,
    matrix,
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
from sdpo.evaluation.score.config import score_options
from sdpo.evaluation.score.scorers import PUBLISHED
from sdpo.evaluation.score.summary import print_grid
from sdpo.evaluation.score.table import ScoreTable, read_scores


def choose_metrics(args: argparse.Namespace, tables: list[ScoreTable]) -> list[str]:
    """--scorers, else those that have scored every image of every model, else the published."""
    if args.scorers:
        return args.scorers
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


def load_models(args: argparse.Namespace) -> tuple[list[Model], list[str]]:
    """The models with every score that is needed, and the metrics they are compared under."""
    manifests = list(args.manifests.values())
    tables = [read_scores(manifest) for manifest in manifests]
    metrics = choose_metrics(args, tables)
    # Weights that are named may be others than those the scores on disk were made with.
    named = {name.partition(".")[0] for name in args.scorer_weights}
    wanted = [m for m in metrics if m in named or any(len(t.missing(m)) for t in tables)]
    if wanted:
        from sdpo.evaluation.score.scoring import score_manifests

        options = score_options(args, args.scorer_weights)
        tables = score_manifests(manifests, wanted, options)
    return [Model(k, t) for k, t in zip(args.manifests, tables, strict=True)], metrics


def write_two(comparison: Comparison, noted: list[str], directory: Path) -> dict[str, Any]:
    """Pair files and summary.json of two models; returns the summary."""
    directory.mkdir(exist_ok=True)
    for metric in comparison.results:
        name = f"pair_{metric}.json"
        write_json(directory / name, pair_file(comparison, metric, directory))
    value = summary(comparison, noted)
    write_json(directory / "summary.json", value)
    return value


def write_many(
    models: list[Model], comparisons: list[Comparison], metrics: list[str], args: Any, noted: Any
) -> None:
    """A folder for each two of the models, the matrices, and a summary.json of all."""
    folders: dict[str, Comparison] = {}
    for number, c in enumerate(comparisons):
        name = folder_name(f"{c.a.label}_vs_{c.b.label}")
        folders[name if name not in folders else f"{name}_{number}"] = c
    pairs = {k: write_two(c, noted, args.outdir / k) for k, c in folders.items()}
    matrices = [matrix(models, comparisons, metric) for metric in metrics]
    for value in matrices:
        write_json(args.outdir / f"matrix_{value['name']}.json", value)
    whole = {
        "models": {m.label: str(m.table.manifest.path) for m in models},
        "align": args.align,
        "ties": args.ties,
        "seed": args.seed,
        "matrices": matrices,
        "pairs": pairs,
        "notes": noted,
    }
    write_json(args.outdir / "summary.json", whole)


def main() -> int:
    """Score what is missing, compare, write everything and print one table."""
    args = parse_args(sys.argv[1:], __doc__)
    models, metrics = load_models(args)
    noted = notes(models, metrics)
    comparisons = [
        compare_models(a, b, metrics, args.align, args.ties, args.seed)
        for a, b in combinations(models, 2)
    ]
    if len(models) == 2:
        write_two(comparisons[0], noted, args.outdir)
        print(f"{headline(comparisons[0])}\n")
        print_grid(metric_grid(comparisons[0]))
    else:
        write_many(models, comparisons, metrics, args, noted)
        for metric in metrics:
            print_grid(matrix_grid(models, comparisons, metric))
            print()
    for line in [line for c in comparisons for line in footnotes(c)]:
        print(f"\n{line}")
    write_text(args.outdir / "summary.csv", summary_csv(comparisons))
    write_text(args.outdir / "summary.md", summary_markdown(models, comparisons, metrics, noted))
    page = args.outdir / "report.html"
    write_report(page, models, comparisons, metrics, noted, inline_images=args.inline_images)
    for note in noted:
        print(f"compare.py: note: {note}", file=sys.stderr)
    print(f"\nwrote {page}, summary.json, summary.csv and summary.md")
    return 0

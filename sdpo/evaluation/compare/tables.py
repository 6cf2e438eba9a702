"""Comparisons as tables: lines of cells for the console and Markdown, and CSV to compute with."""

from __future__ import annotations

from typing import Any

from sdpo.evaluation.compare.results import Comparison, Study, result_fields
from sdpo.evaluation.compare.statistics import Result
from sdpo.evaluation.score.summary import as_csv, markdown

_NAMED = 5  # leftovers named in tables; summary.json has them all


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def _rate(result: Result) -> str:
    low, high = result.win_rate_a_interval
    return f"{_percent(result.win_rate_a)} [{_percent(low)}, {_percent(high)}]"


def _result_cells(result: Result) -> list[str]:
    low, high = result.mean_difference_interval
    return [
        f"{result.mean_a:.4f}",
        f"{result.mean_b:.4f}",
        f"{result.mean_difference:+.4f} [{low:+.4f}, {high:+.4f}]",
        _rate(result),
        f"{result.wins_a}/{result.ties}/{result.wins_b}",
        f"{result.sign_test_p:.2g}",
        str(result.total_pairs),
    ]


_RESULT_HEADER = [
    "mean A",
    "mean B",
    "A - B [95%]",
    "A wins [95%]",
    "wins/ties/losses",
    "sign test p",
    "n",
]


def headline(comparison: Comparison) -> str:
    """Say who A and B are, and what a tie counts."""
    policy = "half a win" if comparison.ties == "half" else "a loss for A"
    return f"A = {comparison.a.label}, B = {comparison.b.label}; a tie counts as {policy}"


def metric_grid(comparison: Comparison) -> list[list[str]]:
    """Lay results out as text, a line per metric; the first line is the head."""
    c = comparison
    rows = [[c.a.title(name), *_result_cells(result)] for name, result in c.results.items()]
    return [["metric", *_RESULT_HEADER], *rows]


def footnotes(comparison: Comparison) -> list[str]:
    """Write a sentence for each side with images that have no partner, and for pairs by index whose
    prompts differ."""
    c = comparison
    lines = []
    for model, other, rows in (
        (c.a, c.b, c.alignment.unmatched_a),
        (c.b, c.a, c.alignment.unmatched_b),
    ):
        if rows:
            prompts = [model.table.manifest.prompts[row] for row in rows]
            of = f"{len(rows)} of {len(model.table.manifest)} images of {model.label}"
            lines.append(
                f"{of} have no partner in {other.label} and are left out: {_name_some(prompts)}"
            )
    if c.alignment.differing:
        prompts = [c.a.table.manifest.prompts[i] for i in c.alignment.differing]
        count = f"{len(prompts)} of {len(c.alignment)} pairs by index"
        lines.append(f"{count} have different prompts, by A's: {_name_some(prompts)}")
    return lines


def _name_some(prompts: list[str]) -> str:
    more = f" and {len(prompts) - _NAMED} more" if len(prompts) > _NAMED else ""
    short = (p if len(p) <= 60 else p[:59] + "…" for p in prompts[:_NAMED])
    return ", ".join(repr(p) for p in short) + more


def category_grid(comparison: Comparison) -> list[list[str]]:
    """Lay win rates out by category, a column per metric; no line where there are no categories."""
    by_metric = comparison.categories
    names = list(next(iter(by_metric.values())))
    titles = [comparison.a.title(metric) for metric in by_metric]
    rows = [["category: A wins [95%]", *titles, "n"]]
    for name in names:
        results = [by_metric[metric][name] for metric in by_metric]
        rows.append([name, *map(_rate, results), str(results[0].total_pairs)])
    return rows if names else []


def matrix_grid(study: Study, metric: str) -> list[list[str]]:
    """Lay win rates out, of the row's model over the column's."""
    values = study.matrix(metric)
    rows = [
        [label, *("-" if rate is None else _percent(rate) for rate in rates)]
        for label, rates in zip(values["models"], values["win_rate"], strict=True)
    ]
    return [[f"{values['metric']}: row over column", *values["models"]], *rows]


def summary_markdown(study: Study) -> str:
    """Write the text of `summary.md`."""
    several = len(study.models) > 2
    parts = [f"# {' vs '.join(model.label for model in study.models)}\n"]
    parts += [f"Note: {note}\n" for note in study.notes]
    if several:
        parts += [_table(matrix_grid(study, metric)) for metric in study.metrics]
    for comparison in study.comparisons:
        if several:
            parts.append(f"## {comparison.a.label} vs {comparison.b.label}\n")
        parts += [f"{headline(comparison)}\n", _table(metric_grid(comparison))]
        parts += [f"{line}\n" for line in footnotes(comparison)]
        categories = category_grid(comparison)
        parts += [_table(categories)] if categories else []
    return "\n".join(parts)


def _table(lines: list[list[str]]) -> str:
    return markdown([[cell.replace("|", "\\|") for cell in line] for line in lines])


def summary_csv(comparisons: list[Comparison]) -> str:
    """Write the text of `summary.csv`: a row per two models, metric and category ("" for all)."""
    rows: list[dict[str, Any]] = []
    for c in comparisons:
        for name, result in c.results.items():
            for category, part in {"": result, **c.categories[name]}.items():
                head = {"model_a": c.a.label, "model_b": c.b.label, "metric": c.a.title(name)}
                rows.append({**head, "name": name, "category": category, **result_fields(part)})
    return as_csv(rows)

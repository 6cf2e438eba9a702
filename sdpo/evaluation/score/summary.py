"""Means of scores: per suite and over suites, on the console and as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdpo.common.files import write_json, write_text
from sdpo.evaluation.score.table import ScoreTable

ALL = "all suites"


@dataclass(frozen=True)
class Row:
    """Holds a scorer's mean over one suite; `standard_error` is s / sqrt(n), None for n = 1."""

    suite: str
    scorer: str
    label: str
    mean: float
    standard_error: float | None
    n: int


def summarise(tables: Sequence[ScoreTable], scorers: Sequence[str]) -> list[Row]:
    """Take means, a row per suite and scorer; of several suites one more over all images.

    Where one suite occurs more than once the manifests are of several models: their folders' names
    are added, and there is no row over all.
    """
    names = [suite_of(table) for table in tables]
    several_models = len(set(names)) < len(names)
    if several_models:
        folders = [table.manifest.path.resolve().parent.name for table in tables]
        names = [f"{folder}/{name}" for folder, name in zip(folders, names, strict=True)]
    rows = []
    for scorer in scorers:
        values = [table.columns[scorer] for table in tables]
        label = tables[0].about[scorer]["label"]
        rows += [_row(n, scorer, label, v) for n, v in zip(names, values, strict=True)]
        if len(tables) > 1 and not several_models:
            rows.append(_row(ALL, scorer, label, np.concatenate(values)))
    return rows


def suite_of(table: ScoreTable) -> str:
    """Name a table's suite, as generate.py noted it, else by the manifest."""
    return table.manifest.entries[0].metadata.get("suite") or table.manifest.stem


def _row(suite: str, scorer: str, label: str, values: np.ndarray) -> Row:
    n = len(values)
    error = float(values.std(ddof=1) / n**0.5) if n > 1 else None
    return Row(suite, scorer, label, float(values.mean()), error, n)


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """Lay means out as text: a line per suite, a column per scorer; the first line is the head."""
    suites = list(dict.fromkeys(row.suite for row in rows))
    scorers = list(dict.fromkeys((row.scorer, row.label) for row in rows))
    cells = {(row.suite, row.scorer): row for row in rows}
    lines = [["suite", "n", *(label for _, label in scorers)]]
    for suite in suites:
        found = [cells[suite, scorer] for scorer, _ in scorers]
        lines.append([suite, str(found[0].n), *map(_cell, found)])
    return lines


def _cell(row: Row) -> str:
    error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
    return f"{row.mean:.4f}{error}"


def write_summary(outdir: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write summary.json, summary.csv and summary.md; `about` goes into the JSON."""
    outdir.mkdir(parents=True, exist_ok=True)
    write_json(outdir / "summary.json", {**about, "rows": [asdict(row) for row in rows]})
    write_text(outdir / "summary.csv", as_csv([asdict(row) for row in rows]))
    write_text(outdir / "summary.md", markdown(grid(rows)))


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows of the same names as CSV; the first line is the names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; the first line is the head."""
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, "|---" * len(lines[0]) + "|\n", *body])


def print_grid(lines: Sequence[Sequence[str]]) -> None:
    """Print a table on the console, the first column to the left."""
    for line in aligned(lines):
        print(line)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lay the cells of lines out in columns, the first one to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(rest, others, strict=True))])
        for name, *rest in lines
    ]

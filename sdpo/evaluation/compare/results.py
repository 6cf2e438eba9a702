"""Two models' scores compared, and the published files that say how: `pair_<metric>.json`,
`summary.json`, and for more than two models `matrix_<metric>.json`.

The names that the published code uses keep their names and meanings; everything else is added.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdpo.common.errors import UserError
from sdpo.evaluation.compare.alignment import Alignment, align
from sdpo.evaluation.compare.statistics import CONFIDENCE, RESAMPLES, Result, compare
from sdpo.evaluation.score.table import ScoreTable

TIE = "tie"
_MADE_WITH = ("weights", "precision")
# Manifests made under other values of these show the settings as well as the models.
_SETTINGS = ("protocol", "steps", "cfg", "seed", "height", "width")
_TIES_POLICY = {"half": "half", "loss": "loss_for_a"}  # as the published files call them


@dataclass(frozen=True)
class Model:
    """Holds a model's images and scores under the name it is reported by."""

    label: str
    table: ScoreTable

    def title(self, metric: str) -> str:
        """Name a metric as people know it."""
        return str(self.table.about.get(metric, {}).get("label", metric))

    def meaning(self, metric: str) -> str:
        """Say what a metric's number is, "" where its title says it."""
        return str(self.table.about.get(metric, {}).get("meaning", ""))


@dataclass(frozen=True)
class Comparison:
    """Holds A against B: `results[metric]` over all pairs, `categories[metric][category]` over a
    category's."""

    a: Model
    b: Model
    alignment: Alignment
    by: str
    ties: str
    seed: int
    results: dict[str, Result]
    categories: dict[str, dict[str, Result]]

    @property
    def pair_categories(self) -> list[str | None]:
        """Every pair's category in its suite."""
        rows = self.a.table.manifest.entries, self.b.table.manifest.entries
        pairs = zip(self.alignment.rows_a, self.alignment.rows_b, strict=True)
        found = (rows[0][i].category or rows[1][j].category for i, j in pairs)
        return [None if category is None else str(category) for category in found]

    def scores(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Give both sides' scores, (pairs,) each."""
        return (
            self.a.table.columns[metric][self.alignment.rows_a],
            self.b.table.columns[metric][self.alignment.rows_b],
        )


def compare_models(
    a: Model, b: Model, metrics: list[str], by: str, ties: str, seed: int
) -> Comparison:
    """Align two models and compare them under every metric.

    Raises:
        UserError: they cannot be aligned, or a score is not finite.
    """
    for model, metric in ((model, metric) for model in (a, b) for metric in metrics):
        bad = np.flatnonzero(~np.isfinite(model.table.columns[metric]))
        if len(bad):
            raise UserError(
                f"{model.table.manifest.path}, row {bad[0]}: its {metric} score is not a finite "
                f"number ({len(bad)} such rows); score it again with eval/score.py"
            )
    alignment = align(a.table.manifest, b.table.manifest, by)
    scores_a, scores_b = (
        np.stack([model.table.columns[metric][rows] for metric in metrics], axis=1)
        for model, rows in ((a, alignment.rows_a), (b, alignment.rows_b))
    )
    results = dict(zip(metrics, compare(scores_a, scores_b, ties, seed), strict=True))
    comparison = Comparison(a, b, alignment, by, ties, seed, results, {m: {} for m in metrics})
    of_pairs = np.array([c or "" for c in comparison.pair_categories])
    for category in sorted(set(of_pairs) - {""}):
        rows = of_pairs == category
        within = compare(scores_a[rows], scores_b[rows], ties, seed)
        for metric, result in zip(metrics, within, strict=True):
            comparison.categories[metric][str(category)] = result
    return comparison


def notes(models: list[Model], metrics: list[str]) -> list[str]:
    """Note what a reader must know before trusting the numbers: images or scores that were not
    made alike."""
    found = []
    first_made = made_with(models[0])
    for model in models[1:]:
        made = made_with(model)
        unlike = [
            f"{name} {_values(first_made[name])} and {_values(made[name])}"
            for name in _SETTINGS
            if first_made[name] and made[name] and first_made[name] != made[name]
        ]
        if unlike:
            found.append(
                f"the images of {models[0].label} and {model.label} were made with different "
                f"settings: {', '.join(unlike)}; generate them alike"
            )
    for metric in metrics:
        first = models[0].table.about.get(metric, {})
        for model in models[1:]:
            other = model.table.about.get(metric, {})
            unlike = [key for key in _MADE_WITH if first.get(key) != other.get(key)]
            if unlike:
                found.append(
                    f"{model.title(metric)} has scored {models[0].label} and {model.label} with "
                    f"different {' and '.join(unlike)}; eval/score.py scores them alike"
                )
    return found


def made_with(model: Model) -> dict[str, list[Any]]:
    """List the values that a manifest's rows hold of each setting, [] where it does not say; of the
    seeds the ones that were given, from which --protocol diffusers counts."""
    found: dict[str, dict[str, Any]] = {name: {} for name in _SETTINGS}
    for entry in model.table.manifest.entries:
        row = dict(entry.metadata)
        if row.get("protocol") == "diffusers" and {"seed", "index"} <= row.keys():
            row["seed"] -= row["index"]
        for name, values in found.items():
            if row.get(name) is not None:
                values[repr(row[name])] = row[name]
    return {name: sorted(values.values(), key=repr) for name, values in found.items()}


def _values(values: list[Any]) -> str:
    return " or ".join(map(str, values[:3]))


def result_fields(result: Result) -> dict[str, Any]:
    """List a result under the names that the published summary uses, and the added ones."""
    return {
        "mean_a": result.mean_a,
        "mean_b": result.mean_b,
        "win_rate_a_over_b": result.win_rate_a,
        "wins_a": result.wins_a,
        "wins_b": result.wins_b,
        "ties": result.ties,
        "total_pairs": result.total_pairs,
        "ci95_low": result.win_rate_a_interval[0],
        "ci95_high": result.win_rate_a_interval[1],
        "sign_test_p": result.sign_test_p,
        "mean_diff": result.mean_difference,
        "mean_diff_ci95_low": result.mean_difference_interval[0],
        "mean_diff_ci95_high": result.mean_difference_interval[1],
    }


def pair_file(comparison: Comparison, metric: str, directory: Path) -> dict[str, Any]:
    """Make the content of `pair_<metric>.json`; image paths are relative to `directory`."""
    c, result = comparison, comparison.results[metric]
    sides = (c.alignment.rows_a, c.a), (c.alignment.rows_b, c.b)
    entries_a, entries_b = ([m.table.manifest.entries[row] for row in rows] for rows, m in sides)
    scores_a, scores_b = c.scores(metric)
    pairs = []
    for i, category in enumerate(c.pair_categories):
        a, b = float(scores_a[i]), float(scores_b[i])
        pair = {
            "pair_index": i,
            "prompt": entries_a[i].prompt,
            "image_a": os.path.relpath(entries_a[i].image, directory),
            "image_b": os.path.relpath(entries_b[i].image, directory),
            "score_a": a,
            "score_b": b,
            "winner": TIE if a == b else c.a.label if a > b else c.b.label,
            "diff": a - b,
            "row_a": c.alignment.rows_a[i],
            "row_b": c.alignment.rows_b[i],
            "category": category,
        }
        if entries_b[i].prompt != pair["prompt"]:
            pair["prompt_b"] = entries_b[i].prompt
        pairs.append(pair)
    return {
        "model_a": c.a.label,
        "model_b": c.b.label,
        "total_pairs": result.total_pairs,
        "wins_a": result.wins_a,
        "wins_b": result.wins_b,
        "ties": result.ties,
        "win_rate_a_over_b": result.win_rate_a,
        "mean_score_a": result.mean_a,
        "mean_score_b": result.mean_b,
        "ties_policy": _TIES_POLICY[c.ties],
        "results": pairs,
    }


def leftovers(model: Model, rows: list[int]) -> list[dict[str, Any]]:
    """List rows without a partner, by number and prompt."""
    return [{"row": row, "prompt": model.table.manifest.prompts[row]} for row in rows]


def summary(comparison: Comparison, noted: list[str]) -> dict[str, Any]:
    """Make the content of `summary.json` of two models."""
    c = comparison
    metrics = [
        {
            "metric": c.a.title(name),
            "name": name,
            **result_fields(result),
            "categories": {k: result_fields(r) for k, r in c.categories[name].items()},
        }
        for name, result in c.results.items()
    ]
    rates = [result.win_rate_a for result in c.results.values()]
    prompts_a, prompts_b = c.a.table.manifest.prompts, c.b.table.manifest.prompts
    return {
        "pair": {
            "model_a": c.a.label,
            "model_b": c.b.label,
            "ties_policy": _TIES_POLICY[c.ties],
        },
        "metrics": metrics,
        # Every metric has the same pairs here, so that the two averages are one; both are kept.
        "averages": {
            "macro_win_rate_a_over_b": float(np.mean(rates)),
            "micro_win_rate_a_over_b": float(np.mean(rates)),
        },
        "json_a": str(c.a.table.manifest.path),
        "json_b": str(c.b.table.manifest.path),
        "align": c.by,
        "ties": c.ties,
        "seed": c.seed,
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "interval": "percentile"},
        "num_pairs": len(c.alignment),
        "unmatched_a": leftovers(c.a, c.alignment.unmatched_a),
        "unmatched_b": leftovers(c.b, c.alignment.unmatched_b),
        "differing_prompts": [
            {"pair_index": i, "prompt_a": prompts_a[i], "prompt_b": prompts_b[i]}
            for i in c.alignment.differing
        ],
        "notes": noted,
    }


@dataclass(frozen=True)
class Study:
    """Holds two or more models, every two of them compared, and what a reader must know first."""

    models: list[Model]
    metrics: list[str]
    comparisons: list[Comparison]
    notes: list[str]

    def matrix(self, metric: str) -> dict[str, Any]:
        """Make the content of `matrix_<metric>.json`: row i, column j is model i over model j; None
        on the diagonal."""
        number = {model.label: i for i, model in enumerate(self.models)}
        names = ("win_rate", "ci95_low", "ci95_high", "wins", "ties", "total_pairs", "sign_test_p")
        cells: dict[str, list[list[Any]]] = {
            name: [[None] * len(number) for _ in number] for name in names
        }
        for c in self.comparisons:
            r, i, j = c.results[metric], number[c.a.label], number[c.b.label]
            for row, column, rate, interval, wins in (
                (i, j, r.win_rate_a, r.win_rate_a_interval, r.wins_a),
                (j, i, r.win_rate_b, r.win_rate_b_interval, r.wins_b),
            ):
                values = (rate, *interval, wins, r.ties, r.total_pairs, r.sign_test_p)
                for name, value in zip(names, values, strict=True):
                    cells[name][row][column] = value
        about = {"metric": self.models[0].title(metric), "name": metric, "models": list(number)}
        return {**about, "ties": self.comparisons[0].ties, **cells}

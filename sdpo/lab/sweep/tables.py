"""A sweep's outcome in a row for each group of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdpo.evaluation.compare.statistics import t_interval
from sdpo.lab.sweep.results import curves

FINAL = ("winner_drift_percent", "loser_drift_percent", "margin", "implicit_acc")


def summarise(table: pa.Table, by: Sequence[str] = ("variant",)) -> list[dict[str, Any]]:
    """A row a group, in the table's order.

    {"group": its label, "runs": how many, and by metric {"mean", "interval", "n"}}, the interval
    being (low, high), Student's t at 95 % over runs, None for one run. The metrics: held-out ones
    and scores at each run's last step, and loser_scale, the mean over all of its steps.
    """
    scores = table.filter(pc.field("kind") == "score")
    wanted = [("heldout", name) for name in FINAL]
    wanted += [("score", name) for name in pc.unique(scores["metric"]).to_pylist()]
    rows: dict[str, dict[str, Any]] = {}
    for label, scale in curves(table, "train", "loser_scale", by).items():
        means = np.nanmean(scale.values, axis=1)
        rows[label] = {"group": label, "runs": len(means), "loser_scale": _spread(means)}
    for kind, metric in wanted:
        for label, found in curves(table, kind, metric, by).items():
            rows[label][metric] = _spread(found.final)
    return list(rows.values())


def _spread(values: np.ndarray) -> dict[str, Any]:
    mean = float(np.mean(values)) if len(values) else None
    return {"mean": mean, "interval": t_interval(values), "n": len(values)}

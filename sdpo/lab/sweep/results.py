"""A sweep's results in one long table, results.parquet: a row for each number.

Columns: run, variant, seed, one for each flag that varies, then
    kind    "train" (metrics.jsonl), "timestep" (its by_timestep), "heldout", "score"
    step    optimizer step; 0 is the model that training started from
    bin     tenth of the schedule's timesteps, 0 to 9; null unless kind is "timestep"
    metric  name; of scores the scorer's, with several suites also suite/scorer
    value   float64; NaN where it was not finite
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdpo.common.errors import UserError
from sdpo.common.files import written_beside
from sdpo.common.jsonl import read_lines
from sdpo.evaluation.compare.statistics import t_interval
from sdpo.evaluation.heldout import read_heldout
from sdpo.evaluation.score.summary import ALL, aligned
from sdpo.lab.sweep.file import PlannedRun, Sweep
from sdpo.lab.sweep.stages import image_dirs, is_trained, read_summary, run_dir
from sdpo.training.distributions import BINS
from sdpo.training.runlog import METRICS_FILE

RESULTS_FILE = "results.parquet"
FINAL = ("winner_drift_percent", "loser_drift_percent", "margin", "implicit_acc")
_BEFORE = {"run": pa.string(), "variant": pa.string(), "seed": pa.int64()}
_AFTER = {
    "kind": pa.string(),
    "step": pa.int64(),
    "bin": pa.int64(),
    "metric": pa.string(),
    "value": pa.float64(),
}


def write_results(sweep: Sweep, out: Path) -> Path:
    """Write the table of the runs whose training is done; returns its path."""
    path = out / RESULTS_FILE
    with written_beside(path) as beside:
        pq.write_table(collect(sweep, out), beside)
    return path


def read_results(path: Path) -> pa.Table:
    """Read a table that `write_results` left.

    Raises:
        UserError: there is none, or it is no such table.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for name in (*_BEFORE, *_AFTER):
        if name not in table.column_names:
            raise UserError(f"{path} is not a sweep's table: it has no column {name}")
    return table


def collect(sweep: Sweep, out: Path) -> pa.Table:
    """Make the table from the directories of the runs whose training is done."""
    done = [run for run in sweep.runs if is_trained(run_dir(out, run))]
    numbers = [list(_numbers(sweep, run, out)) for run in done]
    repeat = np.array([len(n) for n in numbers], dtype=int)
    columns: dict[str, pa.Array] = {}

    def add_repeated(name: str, values: list[Any], dtype: pa.DataType | None) -> None:
        indices = pa.array(np.repeat(np.arange(len(done)), repeat))
        columns[name] = pa.array(values, dtype).take(indices)

    for name, key in (("run", "name"), ("variant", "variant"), ("seed", "seed")):
        add_repeated(name, [getattr(run, key) for run in done], _BEFORE[name])
    for flag in sweep.runs[0].varied:
        # A flag that takes several values is given as text.
        values = [run.varied[flag] for run in done]
        plain = [str(v) if isinstance(v, list) else v for v in values]
        add_repeated(flag, plain, None)
    rows = [row for of_run in numbers for row in of_run]
    for i, (name, dtype) in enumerate(_AFTER.items()):
        columns[name] = pa.array([row[i] for row in rows], dtype)
    return pa.table(columns)


_Number = tuple[str, int, "int | None", str, float]


def _numbers(sweep: Sweep, run: PlannedRun, out: Path) -> Iterator[_Number]:
    directory = run_dir(out, run)
    for entry in read_lines(directory / METRICS_FILE):
        yield from _entry("train", entry)
        for metric, values in (entry.get("by_timestep") or {}).items():
            for place, value in enumerate(values):
                if value is not None:
                    yield "timestep", entry["step"], place, metric, float(value)
    if sweep.heldout is not None:
        for entry in read_heldout(directory):
            yield from _entry("heldout", entry)
    if sweep.images is not None:
        for step, images in image_dirs(sweep, run, out).items():
            rows = read_summary(images)
            several = any(row["suite"] == ALL for row in rows)
            for row in rows:
                whole = row["suite"] == ALL or not several
                metric = row["scorer"] if whole else f"{row['suite']}/{row['scorer']}"
                yield "score", step, None, metric, row["mean"]


def _entry(kind: str, entry: dict[str, Any]) -> Iterator[_Number]:
    for metric, value in entry.items():
        if metric != "step" and (value is None or isinstance(value, int | float)):
            yield kind, entry["step"], None, metric, math.nan if value is None else float(value)


@dataclass(frozen=True)
class Curves:
    """One metric of a group's runs: `values` is (runs, steps), NaN where a run has none; `final`
    each run's value at its own last step, (runs,)."""

    steps: np.ndarray
    values: np.ndarray
    final: np.ndarray


def curves(table: pa.Table, kind: str, metric: str, by: Sequence[str]) -> dict[str, Curves]:
    """Collect a metric over steps by group, in the table's order; {} where nothing is of that name.

    Args:
        by: columns; runs that agree in all of them are one group.
    """
    result = {}
    for key, runs in _by_group(table, kind, metric, by).items():
        steps = sorted({step for run in runs.values() for step in run})
        values = [[run.get(step, math.nan) for step in steps] for run in runs.values()]
        final = [run[max(run)] for run in runs.values()]
        label = label_of(dict(zip(by, key, strict=True)))
        result[label] = Curves(np.array(steps), np.array(values), np.array(final))
    return result


def final_means(
    table: pa.Table, kind: str, metric: str, by: Sequence[str]
) -> dict[tuple[Any, ...], float]:
    """Average over a group's runs the values at their last steps, by the values of `by`."""
    groups = _by_group(table, kind, metric, by)
    return {
        key: float(np.mean([run[max(run)] for run in runs.values()]))
        for key, runs in groups.items()
    }


def _by_group(
    table: pa.Table, kind: str, metric: str, by: Sequence[str]
) -> dict[tuple[Any, ...], dict[str, dict[int, float]]]:
    """Values by group, run and step."""
    chosen = table.filter((pc.field("kind") == kind) & (pc.field("metric") == metric))
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in chosen.select([*dict.fromkeys(["run", "step", "value", *by])]).to_pylist():
        group = found.setdefault(tuple(row[c] for c in by), {})
        group.setdefault(row["run"], {})[row["step"]] = row["value"]
    return found


def timestep_bins(table: pa.Table, metric: str, by: Sequence[str]) -> dict[str, np.ndarray]:
    """Average a training metric by timestep bin and group, (runs, 10): means over the pairs of the
    last half of each run's steps, NaN where a bin held none; {} where runs were not measured so."""
    chosen = table.filter(pc.field("kind") == "timestep")
    half = {
        row["run"]: row["step_max"] / 2
        for row in chosen.group_by("run").aggregate([("step", "max")]).to_pylist()
    }
    sums: dict[str, dict[str, np.ndarray]] = {}
    pairs: dict[tuple[str, int, int], float] = {}
    wanted = chosen.filter(pc.field("metric").isin([metric, "pairs"]))
    columns = [*dict.fromkeys(["run", "step", "bin", "metric", "value", *by])]
    rows = wanted.select(columns).to_pylist()
    for row in rows:
        if row["metric"] == "pairs":
            pairs[row["run"], row["step"], row["bin"]] = row["value"]
    for row in rows:
        if row["metric"] == metric and row["step"] > half[row["run"]]:
            group = sums.setdefault(label_of({c: row[c] for c in by}), {})
            total = group.setdefault(row["run"], np.zeros((2, BINS)))
            weight = pairs[row["run"], row["step"], row["bin"]]
            total[:, row["bin"]] += weight * row["value"], weight
    with np.errstate(invalid="ignore"):
        return {
            label: np.array([total / weight for total, weight in group.values()])
            for label, group in sums.items()
        }


def label_of(values: dict[str, Any]) -> str:
    """Name a group from the columns that make it: the variant's as it is, flags with theirs."""

    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(
        str(value) if name == "variant" else f"{name} {text(value)}"
        for name, value in values.items()
    )


def summarise(table: pa.Table, by: Sequence[str] = ("variant",)) -> list[dict[str, Any]]:
    """Sum up the table, a row a group, in its order.

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


def console_table(table: pa.Table, by: Sequence[str]) -> list[str]:
    """Lay out means over each group's runs, a line a group under a head; [] where no run is done.

    The columns: held-out drifts in percent of the reference's error, implicit accuracy, scores over
    all suites, each at a run's last step, and the mean scale; "-" where it was not measured.
    """
    rows = summarise(table, by)
    if not rows:
        return []
    columns = {
        "winner drift, %": ("winner_drift_percent", "+.1f"),
        "loser drift, %": ("loser_drift_percent", "+.1f"),
        "implicit acc.": ("implicit_acc", ".2f"),
        "scale": ("loser_scale", ".3f"),
    }
    scores = table.filter(pc.field("kind") == "score")
    names = [name for name in pc.unique(scores["metric"]).to_pylist() if "/" not in name]
    columns |= {name: (name, ".3f") for name in names}

    def cell(row: dict[str, Any], metric: str, form: str) -> str:
        mean = row[metric]["mean"] if metric in row else None
        return "-" if mean is None else format(mean, form)

    lines = [["mean over seeds", "runs", *columns]]
    for row in rows:
        cells = (cell(row, metric, form) for metric, form in columns.values())
        lines.append([row["group"], str(row["runs"]), *cells])
    return aligned(lines)


def _spread(values: np.ndarray) -> dict[str, Any]:
    mean = float(np.mean(values)) if len(values) else None
    return {"mean": mean, "interval": t_interval(values), "n": len(values)}

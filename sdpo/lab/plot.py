"""Curves of any runs side by side, from their metrics.jsonl.

    python -m sdpo.lab plot RUN... [--out curves.png] [--smooth N] [--metrics loss,winner_drift]

A run is a train.py --output_dir. Where runs logged the safeguard's scale by timestep, each gets a
strip of it below the curves: a row a tenth of the schedule, a column a step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, parse
from sdpo.common.jsonl import read_lines
from sdpo.training.runlog import METRICS_FILE

PROGRAM = "python -m sdpo.lab plot"
DEFAULT_METRICS = (
    "loss",
    "winner_drift",
    "loser_drift",
    "margin",
    "implicit_acc",
    "loser_scale",
    "grad_norm",
    "lr",
)
COLUMNS = 4


@dataclass(frozen=True)
class PlotConfig:
    """The program's flags."""

    runs: tuple[Path, ...] = flag(
        (), "--output_dir of a run", metavar="RUN", positional=True, required=True
    )
    out: Path = flag(Path("curves.png"), "the picture")
    smooth: int = flag(
        1,
        "mean over the last N steps, with the steps themselves behind it",
        metavar="N",
        check=at_least(1),
    )
    metrics: str | None = flag(
        None,
        "what to draw",
        metavar="NAME,NAME",
        shown=f"those of {','.join(DEFAULT_METRICS)} that were logged",
    )


def main(argv: Sequence[str]) -> int:
    """Read the runs, draw them, say where; returns the exit code.

    Raises:
        UserError: naming the flag or the run and what would be right.
    """
    config = parse(PlotConfig, argv, PROGRAM, __doc__)
    if config.out.is_dir() or not config.out.absolute().parent.is_dir():
        raise UserError(f"--out: {config.out} must be a file in a directory that exists")
    runs = read_runs(config.runs)
    draw(runs, metrics_of(config.metrics, runs), config.smooth, config.out)
    print(f"wrote {config.out}")
    return 0


def read_runs(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Read the lines of each run's metrics.jsonl, by its label.

    Raises:
        UserError: a directory is none of a run, holds no step, or is given twice.
    """
    for path in paths:
        if not (path / METRICS_FILE).is_file():
            raise UserError(f"{path} is not a run: it has no {METRICS_FILE}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"a run is given twice: {' '.join(map(str, paths))}")
    runs = dict(zip(labels_of(paths), (read_lines(p / METRICS_FILE) for p in paths), strict=True))
    for path, entries in zip(paths, runs.values(), strict=True):
        if not entries:
            raise UserError(f"{path / METRICS_FILE} holds no whole line yet")
    return runs


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Label runs by their directories' names, and their parents' until the labels differ."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-count:]) for p in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def metrics_of(given: str | None, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Take --metrics apart, or choose the default panels that some run has numbers for.

    Raises:
        UserError: no run logged one, or none is named.
    """
    lines = (entry for entries in runs.values() for entry in entries)
    known = {k: None for line in lines for k, v in line.items() if not isinstance(v, dict | list)}
    if given is None:
        return [name for name in DEFAULT_METRICS if name in known]
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--metrics: no run logged {name}; there are: {', '.join(known)}")
    if not names:
        raise UserError("--metrics: give at least one name")
    return names


def draw(runs: dict[str, list[dict[str, Any]]], metrics: list[str], window: int, path: Path) -> Any:
    """Draw and write the figure, a panel a metric and a strip a run; returns it."""
    import matplotlib.pyplot as plt
    import numpy as np

    from sdpo.lab.drawing import STEP, colour_of, plain, save, smooth

    strips = {label: found for label, e in runs.items() if (found := scale_by_timestep(e))}
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    heights = [3.2] * rows + [1.6] * len(strips)
    figure = plt.figure(figsize=(4.2 * columns, sum(heights) + 0.5), constrained_layout=True)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for number, name in enumerate(metrics):
        axis = figure.add_subplot(grid[number // columns, number % columns])
        for place, (label, entries) in enumerate(runs.items()):
            logged = [(e["step"], e[name]) for e in entries if name in e]
            if not logged:
                continue
            steps, values = np.array(logged, dtype=float).T
            if window > 1:
                axis.plot(steps, values, color=colour_of(place), lw=0.6, alpha=0.3)
            axis.plot(steps, smooth(values, window), color=colour_of(place), lw=1.4, label=label)
        plain(axis, name, zero=name in ("winner_drift", "loser_drift", "margin"))
        if number == 0:
            axis.legend(frameon=False, fontsize=8)
    for row, (label, (steps, values)) in enumerate(strips.items(), start=rows):
        axis = figure.add_subplot(grid[row, :])
        edges = np.append(steps - 0.5, steps[-1] + 0.5)
        tenths = np.linspace(0, 1, values.shape[0] + 1)
        mesh = axis.pcolormesh(edges, tenths, values, vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"{label}: loser_scale by timestep, share of the schedule", fontsize=9)
        axis.set_xlabel(STEP)
        figure.colorbar(mesh, ax=axis)
    if window > 1:
        figure.suptitle(f"mean over the last {window} steps; faint: each step", fontsize=9)
    save(figure, path)
    return figure


def scale_by_timestep(entries: list[dict[str, Any]]) -> tuple[Any, Any] | None:
    """Collect steps (S,) and the scale of the losers' gradient (bins, S), NaN where a bin held no
    pair; None where the run did not log it."""
    import numpy as np

    found = [
        (entry["step"], entry["by_timestep"]["loser_scale"])
        for entry in entries
        if (entry.get("by_timestep") or {}).get("loser_scale")
    ]
    if not found:
        return None
    steps, values = zip(*found, strict=True)
    return np.array(steps), np.array(values, dtype=float).T


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), "sdpo.plot")

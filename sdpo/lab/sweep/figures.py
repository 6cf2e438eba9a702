"""Figures of a sweep, from its table (`sdpo.lab.sweep.results`); each function writes one PNG.

Bands reach from the least to the largest value over a group's runs, lines are means; both are drawn
at the steps that all of these runs have. `by` names the columns of the table in which the runs of
one group agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdpo.evaluation.generate.manifest import read_manifest
from sdpo.lab.drawing import colour_of, plain, save, show_image, smooth, wrapped
from sdpo.lab.sweep.file import Sweep
from sdpo.lab.sweep.results import (
    RESULTS_FILE,
    Curves,
    curves,
    final_means,
    read_results,
    timestep_bins,
)
from sdpo.lab.sweep.stages import image_dirs, read_summary
from sdpo.training.distributions import BINS

WINNER_DRIFT = "winner_drift_percent"
DRIFTS = {
    WINNER_DRIFT: "winner: held-out error vs reference, %",
    "loser_drift_percent": "loser: held-out error vs reference, %",
    "margin": "held-out margin (negative: preferred)",
}
SMOOTHING = 10  # optimizer steps
MAP = ("beta_dpo", "winner_preserving_mu")


def draw(sweep: Sweep, out: Path) -> list[Path]:
    """Write the figures that fit what a sweep varied and measured to OUT/figures.

    Returns: their paths, none where no run came to its end.
    """
    table = read_results(out / RESULTS_FILE)
    if not len(table):
        return []
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    by = sweep.groups
    drawn = [folder / "scale.png"]
    draw_scale(table, drawn[-1], by)
    if sweep.heldout is not None:
        drawn.append(folder / "drift.png")
        draw_drift(table, drawn[-1], by)
        if set(MAP) <= set(sweep.grid):
            for scorer in sweep.scorers if sweep.images else (None,):
                drawn.append(folder / (f"map_{scorer}.png" if scorer else "map.png"))
                draw_map(table, drawn[-1], *MAP, scorer=scorer)
    if sweep.images is not None and sweep.checkpoints == "all":
        drawn.append(folder / "horizon.png")
        draw_horizon(table, drawn[-1], sweep.scorers, by)
        strips = _manifests(sweep, out)
        if strips:
            drawn.append(folder / "strips.png")
            draw_strips(strips, drawn[-1])
    return drawn


def _manifests(sweep: Sweep, out: Path) -> dict[str, dict[int, Path]]:
    """The first suite's manifests by variant and step, of the first run of each variant."""
    found: dict[str, dict[int, Path]] = {}
    for run in sweep.runs:
        dirs = image_dirs(sweep, run, out)
        if run.variant in found or len(dirs) < 2:
            continue
        found[run.variant] = {
            step: manifest
            for step, directory in dirs.items()
            if read_summary(directory)
            for manifest in _first_manifest(directory)
        }
    return {variant: manifests for variant, manifests in found.items() if manifests}


def _first_manifest(directory: Path) -> list[Path]:
    folders = sorted(p for p in directory.iterdir() if p.is_dir())
    return [folder.with_name(f"{folder.name}.json") for folder in folders[:1]]


def draw_drift(table: pa.Table, path: Path, by: Sequence[str] = ("variant",)) -> plt.Figure:
    """Draw held-out winner drift, loser drift and margin over steps, a line a group."""
    figure, axes = plt.subplots(1, len(DRIFTS), figsize=(14, 4), constrained_layout=True)
    for axis, (metric, title) in zip(axes, DRIFTS.items(), strict=True):
        _lines(axis, curves(table, "heldout", metric, by))
        plain(axis, title)
    _finish(figure, axes, path)
    return figure


def draw_scale(table: pa.Table, path: Path, by: Sequence[str] = ("variant",)) -> plt.Figure:
    """Draw the scale of the losers' gradient over steps; where training measured them, the scale
    and the winners' drift by timestep bin over the last half of the steps."""
    binned = {
        "scale of the loser's gradient": timestep_bins(table, "loser_scale", by),
        "winner drift in training": timestep_bins(table, "winner_drift", by),
    }
    panels = 3 if any(binned.values()) else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(4.7 * panels, 4), constrained_layout=True, squeeze=False
    )
    scale = {
        label: replace(c, values=smooth(c.values, SMOOTHING))
        for label, c in curves(table, "train", "loser_scale", by).items()
    }
    _lines(axes[0, 0], scale, marker="")
    plain(axes[0, 0], f"scale of the loser's gradient (mean of {SMOOTHING} steps)")
    axes[0, 0].set_ylim(-0.03, 1.06)
    centres = (np.arange(BINS) + 0.5) / BINS
    for axis, (title, groups) in zip(axes[0, 1:], binned.items(), strict=False):
        _lines(axis, {label: Curves(centres, v, v[:, -1]) for label, v in groups.items()})
        plain(axis, f"{title}, last half", "timestep, share of the schedule")
    _finish(figure, axes[0], path)
    return figure


def draw_map(
    table: pa.Table,
    path: Path,
    x: str = MAP[0],
    y: str = MAP[1],
    scorer: str | None = None,
) -> plt.Figure:
    """Draw means over seeds of the final held-out winner drift and of a score, a cell for each
    value of `x` and `y`; a row of maps a variant. The score's colours are about the starting
    model's."""
    metrics = {"heldout": WINNER_DRIFT} | ({"score": scorer} if scorer else {})
    variants = pc.unique(table["variant"]).to_pylist()
    xs, ys = (sorted(pc.unique(table[flag]).to_pylist()) for flag in (x, y))
    width = 1.6 + (1.6 + 1.1 * len(xs)) * len(metrics)
    height = 1.4 + (0.7 + 0.6 * len(ys)) * len(variants)
    figure, axes = plt.subplots(
        *(len(variants), len(metrics)),
        figsize=(width, height),
        constrained_layout=True,
        squeeze=False,
    )
    for column, (kind, metric) in enumerate(metrics.items()):
        means = final_means(table, kind, metric, ("variant", y, x))
        cells = np.array(
            [[[means.get((v, at_y, at_x), np.nan) for at_x in xs] for at_y in ys] for v in variants]
        )
        if kind == "heldout":
            title, form, middle = "final held-out winner drift, %", "+.1f", 0.0
        else:
            middle = start_score(table, metric)
            title, form = f"final {metric} score (start: {middle:.3f})", ".3f"
        reach = np.nanmax(np.abs(cells - middle), initial=1e-12)
        for axis, variant, values in zip(axes[:, column], variants, cells, strict=True):
            image = axis.imshow(
                values,
                # Red is what one does not want: errors that rise, scores that fall.
                cmap="RdBu_r" if kind == "heldout" else "RdBu",
                vmin=middle - reach,
                vmax=middle + reach,
                origin="lower",
                aspect="auto",
            )
            for (at_y, at_x), value in np.ndenumerate(values):
                colour = "white" if abs(value - middle) > 0.6 * reach else "black"
                text = "-" if np.isnan(value) else f"{value:{form}}"
                axis.text(at_x, at_y, text, ha="center", va="center", fontsize=8, color=colour)
            axis.set_xticks(range(len(xs)), [f"{v:g}" for v in xs])
            axis.set_yticks(range(len(ys)), [f"{v:g}" for v in ys])
            axis.set_xlabel(x)
            axis.set_ylabel(y)
            axis.set_title(f"{variant}: {title}" if len(variants) > 1 else title, fontsize=9)
            figure.colorbar(image, ax=axis)
    save(figure, path)
    return figure


def draw_horizon(
    table: pa.Table, path: Path, scorers: Sequence[str], by: Sequence[str] = ("variant",)
) -> plt.Figure:
    """Draw held-out winner drift and scores over long runs; dotted: where they began."""
    found = {DRIFTS[WINNER_DRIFT]: curves(table, "heldout", WINNER_DRIFT, by)}
    found |= {f"{scorer} score": curves(table, "score", scorer, by) for scorer in scorers}
    found = {title: groups for title, groups in found.items() if groups}
    figure, axes = plt.subplots(
        1, len(found), figsize=(5 * len(found), 4), constrained_layout=True, squeeze=False
    )
    for axis, (title, groups) in zip(axes[0], found.items(), strict=True):
        _lines(axis, groups)
        plain(axis, title, zero=title == DRIFTS[WINNER_DRIFT])
    for axis, scorer in zip(axes[0][-len(scorers) :] if scorers else (), scorers, strict=True):
        axis.axhline(start_score(table, scorer), color="black", lw=0.8, ls=":")
    _finish(figure, axes[0], path)
    return figure


def draw_strips(
    manifests: dict[str, dict[int, Path]], path: Path, prompts: Sequence[int] = (0, 1, 2)
) -> plt.Figure:
    """Draw images of the same prompts and noise over steps, a column a step.

    Args:
        manifests: eval/generate.py's, by row (a variant, say) and step.
        prompts: their numbers in the suite; each is drawn once for each row.
    """
    steps = sorted({step for of_row in manifests.values() for step in of_row})
    rows = [(label, number) for number in prompts for label in manifests]
    read = {
        label: {step: read_manifest(p).entries for step, p in of_row.items()}
        for label, of_row in manifests.items()
    }
    figure, axes = plt.subplots(
        len(rows), len(steps), figsize=(1.2 * len(steps) + 1.6, 1.25 * len(rows)), squeeze=False
    )
    for row, (label, number) in enumerate(rows):
        for column, step in enumerate(steps):
            axis = axes[row, column]
            if step in read[label]:
                show_image(axis, read[label][step][number].image)
            else:
                axis.axis("off")
            if row == 0:
                axis.set_title(f"step {step}", fontsize=8)
        prompt = next(iter(read[label].values()))[number].prompt
        named = f"{wrapped(label, 22)}\n" if len(manifests) > 1 else ""
        axes[row, 0].set_ylabel(
            f"{named}{wrapped(prompt, 26)}", fontsize=6.5, rotation=0, ha="right", va="center"
        )
    figure.tight_layout(pad=0.4)
    save(figure, path)
    return figure


def start_score(table: pa.Table, scorer: str) -> float:
    """Find the score of the model that training started from."""
    chosen = (
        (pc.field("kind") == "score") & (pc.field("metric") == scorer) & (pc.field("step") == 0)
    )
    values = table.filter(chosen)["value"]
    return values[0].as_py() if len(values) else float("nan")


def _lines(axis: plt.Axes, groups: dict[str, Curves], marker: str = "o") -> None:
    for number, (label, group) in enumerate(groups.items()):
        known = ~np.isnan(group.values).any(axis=0)
        steps, values = group.steps[known], group.values[:, known]
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(steps, low, high, color=colour_of(number), alpha=0.18, lw=0)
        axis.plot(
            steps, values.mean(axis=0), marker=marker, ms=3, color=colour_of(number), label=label
        )


def _finish(figure: plt.Figure, axes: np.ndarray, path: Path) -> None:
    lines = {
        line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]
    }
    if lines:
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside lower center",
            ncols=min(len(lines), len(axes)),
            frameon=False,
            fontsize=9,
        )
    figure.suptitle("line: mean over runs; band: least to largest", fontsize=9)
    save(figure, path)

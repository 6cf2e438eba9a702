"""An audit's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdpo.lab.audit.jacobian import QUANTILES
from sdpo.lab.audit.summary import MEASURED_ON, numbers, pair_quantities
from sdpo.lab.audit.updates import UPDATES
from sdpo.lab.drawing import BLUE, COLOURS, RED, colour_of, plain, plt, save
from sdpo.training.distributions import BINS

TITLES = {
    "gradient": "along the gradient",
    "preconditioned": "after Adam's preconditioning",
    "adam": "AdamW's whole step",
}
TIME = "time, as a share of the longest"
# Modes that the pictures by timestep show; the others lie between them.
SHOWN = ("none", "batch", "pair", "parameter", "weighted")


def draw(lines: dict[str, list[dict[str, Any]]], summary: dict[str, Any], out: Path) -> None:
    """Draw updates_own.png, updates_next.png, both by timestep too, jacobian.png and, where
    measured, spectrum.png."""
    for on, about in MEASURED_ON.items():
        rows = [row for row in summary["updates"] if row["on"] == on]
        draw_updates(rows, about, out / f"updates_{on}.png")
        draw_by_timestep(rows, about, out / f"updates_{on}_by_timestep.png")
    mu = summary["flags"]["winner_preserving_mu"]
    draw_jacobian(pair_quantities(lines["jacobian"], mu), summary, out / "jacobian.png")
    if lines["spectrum"]:
        draw_spectrum(lines["spectrum"], out / "spectrum.png")


def draw_updates(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """Draw, above, the share of batches whose winners' error would rise; below, its change."""
    figure, axes = plt.subplots(2, len(UPDATES), figsize=(15, 7.5), constrained_layout=True)
    labels = ("batches whose winners' error rises, %", "change of that error, %")
    for column, update in enumerate(UPDATES):
        mine = [r for r in rows if r["update"] == update]
        for axis, name, label in zip(axes[:, column], ("rising_", ""), labels, strict=True):
            _bars(axis, mine, (f"{name}first_order", f"{name}realised"))
            plain(axis, TITLES[update] if name else "", xlabel="")
            axis.set_ylabel(label, fontsize=8)
        axes[0, column].set_ylim(0, 105)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"One step, {about}, by treatment of the losers and its mean scale; 95 % over batches"
    )
    save(figure, path)


def _bars(axis: plt.Axes, rows: list[dict[str, Any]], names: tuple[str, str]) -> None:
    at = np.arange(len(rows))
    legends = ("to first order", "after the step")
    for name, label, colour, side in zip(names, legends, (BLUE, COLOURS[2]), (-1, 1), strict=True):
        values = np.array([r[name] for r in rows])
        ends = np.array([r[f"{name}_interval"] for r in rows]).T
        axis.bar(at + 0.2 * side, values, 0.38, color=colour, label=label)
        errors = np.abs(ends - values)
        axis.errorbar(at + 0.2 * side, values, errors, fmt="none", ecolor="black", lw=1)
    labels = [f"{r['mode']}, {r['scale']:.2f}" for r in rows]
    axis.set_xticks(at, labels, fontsize=7, rotation=40, ha="right")


def draw_by_timestep(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """Draw the first-order change of the winners' error by timestep bin."""
    figure, axes = plt.subplots(1, len(UPDATES), figsize=(15, 4), constrained_layout=True)
    for axis, update in zip(axes, UPDATES, strict=True):
        shown = [r for r in rows if r["update"] == update and r["mode"] in SHOWN]
        for number, row in enumerate(shown):
            values = numbers(row["by_timestep"]["first_order"])
            axis.plot(_centres(), values, "o-", ms=3, color=colour_of(number), label=row["mode"])
        plain(axis, TITLES[update], xlabel=TIME)
    axes[0].set_ylabel("first-order change of winners' error, %", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One step, {about}")
    save(figure, path)


def draw_jacobian(found: dict[str, np.ndarray], summary: dict[str, Any], path: Path) -> None:
    """Draw output against parameters, by pair: cosine, norm ratio, scale; and over timesteps."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), constrained_layout=True)
    titles = {
        "cosine": "cosine of the two branches",
        "ratio": "norm, loser / winner",
        "scale": "safeguard's scale",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        x, y = found[f"output_{name}"], found[f"parameter_{name}"]
        points = axis.scatter(x, y, c=found["bin"], cmap="viridis", s=14, vmin=0, vmax=BINS - 1)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="black", lw=0.8, ls=":")
        plain(axis, title, xlabel="residuals at the output", zero=False)
        axis.set_ylabel("gradients over the parameters", fontsize=8)
    figure.colorbar(points, ax=axes[2], label="tenth of the times")
    for space, colour in (("output", BLUE), ("parameter", RED)):
        values = numbers(summary["jacobian"]["by_timestep"][f"{space}_cosine"])
        axes[3].plot(_centres(), values, "o-", ms=3, color=colour, label=space)
    plain(axes[3], "cosine by timestep", xlabel=TIME, zero=False)
    axes[3].legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_spectrum(pairs: list[dict[str, Any]], path: Path) -> None:
    """Draw eigenvalue quantiles of J J^T over their mean, and the branches' Jacobians apart."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for pair, colour in zip(pairs, plt.cm.viridis(np.linspace(0, 0.9, len(pairs))), strict=True):
        values = np.maximum(numbers(pair["quantiles"]), 1e-12)
        axes[0].plot(QUANTILES, values, "o-", color=colour, label=f"t = {pair['timestep']:.3g}")
    plain(axes[0], "eigenvalues of J J^T over their mean (dotted: an isometry)", "quantile", False)
    axes[0].axhline(1.0, color="black", lw=0.8, ls=":")
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    at = np.arange(len(pairs))
    for name, colour, label, side in (
        ("jacobian_cosine", BLUE, "cosine of J_w and J_l", -0.2),
        ("jacobian_difference", RED, "|J_w - J_l| / |J_w|", 0.2),
    ):
        axes[1].bar(at + side, numbers([p[name] for p in pairs]), 0.38, color=colour, label=label)
    plain(axes[1], "the two branches' Jacobians, Frobenius", "timestep", zero=False)
    axes[1].set_xticks(at, [f"{p['timestep']:.3g}" for p in pairs])
    axes[1].set_ylim(0, 1.3)
    axes[1].legend(frameon=False, fontsize=8, ncols=2)
    save(figure, path)


def _centres() -> np.ndarray:
    return (np.arange(BINS) + 0.5) / BINS

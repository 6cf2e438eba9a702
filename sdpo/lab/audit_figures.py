"""An audit's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sdpo.distributions import BINS
from sdpo.files import written_beside
from sdpo.lab.audit_summary import MEASURED_ON, TIMESTEPS, pair_quantities
from sdpo.lab.jacobian import QUANTILES
from sdpo.lab.updates import UPDATES

TITLES = {
    "gradient": "along the gradient",
    "preconditioned": "after Adam's preconditioning",
    "adam": "AdamW's whole step",
}
# Modes that the pictures by timestep show; the others lie between them.
SHOWN = ("none", "batch", "pair", "parameter", "weighted")


def draw(lines: dict[str, list[dict[str, Any]]], summary: dict[str, Any], out: Path) -> None:
    """updates_own.png, updates_next.png, both by timestep too, jacobian.png and, where measured,
    spectrum.png."""
    for on in MEASURED_ON:
        rows = [row for row in summary["updates"] if row["on"] == on]
        draw_updates(rows, MEASURED_ON[on], out / f"updates_{on}.png")
        draw_by_timestep(rows, MEASURED_ON[on], out / f"updates_{on}_by_timestep.png")
    mu = summary["flags"]["winner_preserving_mu"]
    draw_jacobian(pair_quantities(lines["jacobian"], mu), summary, out / "jacobian.png")
    if lines["spectrum"]:
        draw_spectrum(lines["spectrum"], out / "spectrum.png")


def draw_updates(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """Above: share of batches whose winners' error would rise. Below: the change itself."""
    figure, axes = plt.subplots(2, len(UPDATES), figsize=(15, 7), constrained_layout=True)
    for column, update in enumerate(UPDATES):
        mine = [r for r in rows if r["update"] == update]
        at = np.arange(len(mine))
        labels = [f"{r['mode']}\n{r['scale']:.2f}" for r in mine]
        for row, (names, offset) in enumerate(
            (
                (("rising_first_order", "rising_realised"), 0.2),
                (("first_order", "realised"), 0.2),
            )
        ):
            axis = axes[row, column]
            for name, colour, side in zip(names, ("#2a6fbb", "#e39b38"), (-1, 1), strict=True):
                values = np.array([r[name] for r in mine])
                ends = np.array([r[f"{name}_interval"] for r in mine]).T
                label = "to first order" if "first" in name else "after the step"
                axis.bar(at + side * offset, values, 0.38, color=colour, label=label)
                errors = np.abs(ends - values)
                axis.errorbar(at + side * offset, values, errors, fmt="none", ecolor="black", lw=1)
            axis.axhline(0, color="black", lw=0.8)
            axis.set_xticks(at, labels, fontsize=7, rotation=45)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylabel(
                "batches whose winners' error rises, %" if row == 0 else "change of that error, %",
                fontsize=8,
            )
        axes[0, column].set_ylim(0, 105)
        axes[0, column].set_title(TITLES[update], fontsize=10)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"One step, {about}, by treatment of the losers and its mean scale; 95 % over batches"
    )
    _save(figure, path)


def draw_by_timestep(rows: list[dict[str, Any]], about: str, path: Path) -> None:
    """First-order change of the winners' error by timestep bin."""
    figure, axes = plt.subplots(1, len(UPDATES), figsize=(15, 3.8), constrained_layout=True)
    for axis, update in zip(axes, UPDATES, strict=True):
        for row in rows:
            if row["update"] == update and row["mode"] in SHOWN:
                values = row["by_timestep"]["first_order"]
                axis.plot(_centres(), _numbers(values), "o-", ms=3, label=row["mode"])
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set_title(TITLES[update], fontsize=10)
        axis.set_xlabel("timestep")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("first-order change of winners' error, %", fontsize=8)
    figure.suptitle(f"One step, {about}")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_jacobian(found: dict[str, np.ndarray], summary: dict[str, Any], path: Path) -> None:
    """Output against parameters, pair by pair: cosine, norm ratio, scale; and over timesteps."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), constrained_layout=True)
    for axis, name, title in zip(
        axes,
        ("cosine", "ratio", "scale"),
        ("cosine of the two branches", "norm, loser / winner", "safeguard's scale"),
        strict=False,
    ):
        x, y = found[f"output_{name}"], found[f"parameter_{name}"]
        points = axis.scatter(x, y, c=found["timestep"], cmap="viridis", s=14, vmin=0, vmax=1000)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="black", lw=0.8, ls=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("residuals at the output")
        axis.set_ylabel("gradients over the parameters", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.colorbar(points, ax=axes[2], label="timestep")
    by_timestep = summary["jacobian"]["by_timestep"]
    for space, colour in (("output", "#2a6fbb"), ("parameter", "#c8442b")):
        values = _numbers(by_timestep[f"{space}_cosine"])
        axes[3].plot(_centres(), values, "o-", ms=3, color=colour, label=space)
    axes[3].set_title("cosine by timestep", fontsize=10)
    axes[3].set_xlabel("timestep")
    axes[3].legend(frameon=False, fontsize=8)
    axes[3].grid(alpha=0.25)
    axes[3].spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_spectrum(pairs: list[dict[str, Any]], path: Path) -> None:
    """Eigenvalue quantiles of J J^T over their mean, and the branches' Jacobians apart."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    colours = plt.cm.viridis(np.linspace(0, 0.9, len(pairs)))
    for pair, colour in zip(pairs, colours, strict=True):
        label = f"t = {pair['timestep']}"
        axes[0].plot(
            QUANTILES, np.maximum(pair["quantiles"], 1e-12), "o-", color=colour, label=label
        )
    axes[0].axhline(1.0, color="black", lw=0.8, ls=":")
    axes[0].set_yscale("log")
    axes[0].set_title("eigenvalues of J J^T over their mean (dotted: an isometry)", fontsize=10)
    axes[0].set_xlabel("quantile")
    axes[0].legend(frameon=False, fontsize=8)
    at = np.arange(len(pairs))
    for name, colour, label, side in (
        ("jacobian_cosine", "#2a6fbb", "cosine of J_w and J_l", -0.2),
        ("jacobian_difference", "#c8442b", "|J_w - J_l| / |J_w|", 0.2),
    ):
        axes[1].bar(at + side, [p[name] for p in pairs], 0.38, color=colour, label=label)
    axes[1].set_xticks(at, [f"t = {p['timestep']}" for p in pairs])
    axes[1].set_title("the two branches' Jacobians, Frobenius", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _centres() -> np.ndarray:
    return (np.arange(BINS) + 0.5) * TIMESTEPS / BINS


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values])


def _save(figure: Any, path: Path) -> None:
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=110)
    plt.close(figure)

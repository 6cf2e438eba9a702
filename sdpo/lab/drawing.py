"""What the project's figures have in common: colours, plain axes, writing a PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sdpo.common.files import written_beside

RED, BLUE = "#c8442b", "#2a6fbb"
COLOURS = (RED, BLUE, "#e39b38", "#4a9a5b", "#7b58a8", "#4c4c4c", "#c06a9b", "#35a0a8")
STEP = "optimizer step"


def colour_of(number: int) -> str:
    """Choose the colour of the n-th thing."""
    return COLOURS[number % len(COLOURS)]


def plain(axis: plt.Axes, title: str, xlabel: str = STEP, zero: bool = True) -> None:
    """Give an axis title, label and a faint grid, and no box; with `zero` a dotted line at 0."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    if zero:
        axis.axhline(0, color="black", lw=0.8, ls=":")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def show_image(axis: plt.Axes, path: Path) -> None:
    """Show an image file, its pixels as they are, without ticks."""
    axis.imshow(plt.imread(path), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def smooth(numbers: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Average the last `window` values, fewer at the start, without those that are NaN; NaN where
    there is none. Works along the last axis."""
    values = np.asarray(numbers, dtype=float)
    known = ~np.isnan(values)

    def sums(of: np.ndarray) -> np.ndarray:
        start = np.zeros((*of.shape[:-1], 1))
        total = np.cumsum(np.concatenate([start, of], axis=-1), axis=-1)
        ends = np.arange(1, of.shape[-1] + 1)
        return total[..., ends] - total[..., np.maximum(ends - window, 0)]

    with np.errstate(invalid="ignore"):
        return sums(np.where(known, values, 0.0)) / sums(known.astype(float))


def wrapped(text: str, width: int = 24) -> str:
    """Break a text into lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def save(figure: Any, path: Path) -> None:
    """Write a figure whole, as PNG, and close it; its axes can still be read."""
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)

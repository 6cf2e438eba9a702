"""A step's metrics as trackers take them: scalars, and a histogram where there is such a thing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from accelerate import Accelerator

from sdpo.training.distributions import (
    BY_TIMESTEP,
    HISTOGRAM_KEY,
    SCALE_BUCKETS,
    TIMESTEPS_KEY,
)

_NOT_SCALARS = ("step", "epoch", TIMESTEPS_KEY, HISTOGRAM_KEY)


def track(accelerator: Accelerator, entry: dict[str, Any], bins: list[str]) -> None:
    """Give one metrics.jsonl line to all trackers.

    Args:
        entry: a step of one's own may leave the distributions out.
        bins: their names, by timestep.
    """
    accelerator.log(scalars(entry, bins), step=entry["step"])
    for tracker in accelerator.trackers:
        if tracker.name in _HISTOGRAMS and HISTOGRAM_KEY in entry:
            _HISTOGRAMS[tracker.name](tracker.tracker, entry[HISTOGRAM_KEY], entry["step"])


def scalars(entry: dict[str, Any], bins: list[str]) -> dict[str, float]:
    """Pick the line's numbers, those by timestep as NAME_by_timestep/FIRST-LAST; empty bins are
    left out."""
    numbers = {k: v for k, v in entry.items() if k not in _NOT_SCALARS}
    by_timestep = entry.get(TIMESTEPS_KEY, {})
    for name in by_timestep.keys() & set(BY_TIMESTEP):
        values = zip(bins, by_timestep[name], strict=True)
        numbers |= {f"{name}_by_timestep/{bin}": v for bin, v in values if v is not None}
    return numbers


def _edges() -> list[float]:
    return [i / SCALE_BUCKETS for i in range(SCALE_BUCKETS + 1)]


def _tensorboard(writer: Any, counts: list[int], step: int) -> None:
    edges = _edges()
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    writer.add_histogram_raw(
        HISTOGRAM_KEY,
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )


def _wandb(run: Any, counts: list[int], step: int) -> None:
    import wandb

    histogram = wandb.Histogram(np_histogram=(counts, _edges()))
    run.log({HISTOGRAM_KEY: histogram}, step=step)


_HISTOGRAMS = {"tensorboard": _tensorboard, "wandb": _wandb}

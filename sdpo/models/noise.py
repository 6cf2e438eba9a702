"""Noise processes: how clean latents are noised, what a model is to predict there, and which times
are trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from sdpo.common import randomness
from sdpo.common.randomness import Key

# What of a scheduler's settings training depends on: the others are of sampling.
SETTINGS = (
    *("num_train_timesteps", "prediction_type", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "rescale_betas_zero_snr", "shift", "flow_shift", "use_dynamic_shifting"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),
)


class NoiseProcess(Protocol):
    """What training, held-out evaluation and audits ask of a process. Times are (B,), latents
    (B, C, h, w); a pair's winner and loser get one time and one noise."""

    def draw_times(self, keys: Sequence[Key]) -> Tensor:
        """Draw a training time for each key, as a function of that key alone."""

    def times_at(self, shares: Sequence[float]) -> Tensor:
        """Find the times at shares in [0, 1) of the training distribution, for stratified draws."""

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Make x_t of clean latents x_0 and standard normal noise."""

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Give what the model is to predict at x_t."""

    def bin_of(self, times: Tensor, bins: int) -> Tensor:
        """Number each time's part, (B,), where the process is divided into `bins` equal parts."""

    def bin_names(self, bins: int) -> list[str]:
        """Name those parts by their first and last time."""


@dataclass(frozen=True)
class Diffusion:
    """DDPM's discrete process x_t = a_t x_0 + s_t eps, t uniform over the schedule's integers; the
    model predicts eps (Ho et al., NeurIPS 2020) or v = a_t eps - s_t x_0 (Salimans and Ho, ICLR
    2022), as the schedule says."""

    schedule: Any  # DDPMScheduler

    @property
    def count(self) -> int:
        """The number of times, 0 to count - 1."""
        return int(self.schedule.config.num_train_timesteps)

    def draw_times(self, keys: Sequence[Key]) -> Tensor:
        """Draw one of the schedule's integers for each key, (B,)."""
        return randomness.timesteps(self.count, keys)

    def times_at(self, shares: Sequence[float]) -> Tensor:
        """Find the integers at shares in [0, 1) of the schedule, (B,)."""
        return torch.tensor([int(share * self.count) for share in shares])

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Make x_t = a_t x_0 + s_t eps, (B, C, h, w)."""
        mixed: Tensor = self.schedule.add_noise(clean, noise, times)
        return mixed

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Give eps itself, or v."""
        if self.schedule.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.schedule.get_velocity(clean, noise, times)
        return velocity

    def bin_of(self, times: Tensor, bins: int) -> Tensor:
        """Number each time's part of the schedule, (B,)."""
        return times * bins // self.count

    def bin_names(self, bins: int) -> list[str]:
        """Name the parts by their first and last time: 000-099, ..., 900-999 of 1000."""
        starts = [math.ceil(k * self.count / bins) for k in range(bins + 1)]
        digits = len(str(self.count - 1))
        return [f"{first:0{digits}d}-{end - 1:0{digits}d}" for first, end in pairwise(starts)]


@dataclass(frozen=True)
class Times:
    """How a rectified flow's times are drawn; None: as the base's scheduler says, or unshifted.

    sampling: "logit-normal", sigma = sigmoid(mean + std z) with z standard normal (Esser et al.,
    ICML 2024), or "uniform". shift: a in a sigma / (1 + (a - 1) sigma), which follows either.
    """

    sampling: str = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None


def base_shift(config: Any, tokens: int) -> float:
    """Compute the shift a of sigma that a flow scheduler's configuration asks for.

    Args:
        config: of a scheduler of diffusers.
        tokens: of the image, which a dynamic shift depends on: m is linear in them and a = e^m.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    m = config["base_shift"] + slope * (tokens - low)
    return m if config.get("time_shift_type") == "linear" else math.exp(m)


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path x_t = (1 - sigma) x_0 + sigma eps, whose velocity eps - x_0 the model
    predicts (Liu et al., ICLR 2023). A time is sigma itself, float32 in [0, 1]; it is drawn from a
    continuum, not from a sampler's steps."""

    shift: float = 1.0
    how: Times = field(default_factory=Times)

    def draw_times(self, keys: Sequence[Key]) -> Tensor:
        """Draw one sigma for each key, (B,)."""
        return self._sigma(randomness.normal((), keys, "timestep"))

    def times_at(self, shares: Sequence[float]) -> Tensor:
        """Find the sigmas at shares in [0, 1) of the distribution that is trained on, (B,)."""
        return self._sigma(torch.special.ndtri(torch.tensor(shares, dtype=torch.float64)).float())

    def _sigma(self, normal: Tensor) -> Tensor:
        if self.how.sampling == "uniform":
            sigma = torch.special.ndtr(normal)
        else:
            sigma = torch.sigmoid(self.how.mean + self.how.std * normal)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Make x_t = (1 - sigma) x_0 + sigma eps, (B, C, h, w)."""
        sigma = times.reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Give the velocity eps - x_0."""
        return noise - clean

    def bin_of(self, times: Tensor, bins: int) -> Tensor:
        """Number each sigma's part of [0, 1], (B,)."""
        return (times * bins).long().clamp(0, bins - 1)

    def bin_names(self, bins: int) -> list[str]:
        """Name the parts by their ends: 0.0-0.1, ..., 0.9-1.0."""
        return [f"{k / bins:.3g}-{(k + 1) / bins:.3g}" for k in range(bins)]

"""Noise processes: how clean latents are noised, what a model is to predict there, and which times
are trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from sdpo.common import randomness
from sdpo.common.randomness import Key


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
    model predicts eps (Ho et al., NeurIPS 2020)."""

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
        """Give eps itself."""
        return noise

    def bin_of(self, times: Tensor, bins: int) -> Tensor:
        """Number each time's part of the schedule, (B,)."""
        return times * bins // self.count

    def bin_names(self, bins: int) -> list[str]:
        """Name the parts by their first and last time: 000-099, ..., 900-999 of 1000."""
        starts = [math.ceil(k * self.count / bins) for k in range(bins + 1)]
        digits = len(str(self.count - 1))
        return [f"{first:0{digits}d}-{end - 1:0{digits}d}" for first, end in pairwise(starts)]

"""Drift and scale of a step's pairs by timestep, and a histogram of the scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sdpo.losses.preference import LossOutput
    from sdpo.models.noise import NoiseProcess

BINS = 10
BY_TIMESTEP = ("winner_drift", "loser_drift", "loser_scale")
SCALE_BUCKETS = 20
TIMESTEPS_KEY = "by_timestep"
HISTOGRAM_KEY = "loser_scale_histogram"


class Distributions:
    """Sums a step's pairs on the device: `BY_TIMESTEP` in ten equal parts of the process, and a
    histogram of the scales in twenty equal buckets of [0, 1], the last one closed."""

    def __init__(self, process: NoiseProcess) -> None:
        """`process`: whose times the pairs have."""
        self.process = process
        # Numbers of pairs and sums by bin, (1 + 3) * BINS, then SCALE_BUCKETS counts.
        self._rows: list[Tensor] = []

    def add(self, output: LossOutput, timesteps: Tensor, count_scales: bool = True) -> None:
        """Add one micro-batch of B pairs at `timesteps`, (B,).

        Without `count_scales` it leaves the histogram alone: its scale was counted before.
        """
        import torch

        values = torch.stack([output.per_pair[name].float() for name in BY_TIMESTEP])
        values = torch.cat([torch.ones_like(values[:1]), values])
        bins = torch.arange(BINS, device=timesteps.device)
        here = self.process.bin_of(timesteps, BINS)[:, None] == bins
        # Chosen, not multiplied: what is not finite stays in its own bin.
        binned = torch.where(here, values[:, :, None], 0.0).sum(1)
        buckets = (output.scale.float().reshape(-1, 1) * SCALE_BUCKETS).floor()
        counts = buckets.clamp(max=SCALE_BUCKETS - 1) == torch.arange(
            SCALE_BUCKETS, device=buckets.device
        )
        histogram = counts.sum(0) * count_scales
        self._rows.append(torch.cat([binned.flatten(), histogram.to(binned)]))

    def sums(self) -> Tensor:
        """Give all of it as one vector, whose sum over processes `read` takes."""
        from sdpo.training.metrics import added

        return added(self._rows)

    @staticmethod
    def read(sums: Tensor) -> dict[str, Any]:
        """Make a metrics.jsonl line's part: numbers of pairs and means a bin (None in an empty
        one), and the histogram's counts."""
        numbers = sums.double().tolist()
        rows = [numbers[i * BINS : (i + 1) * BINS] for i in range(1 + len(BY_TIMESTEP))]
        pairs = [int(n) for n in rows[0]]
        by_timestep: dict[str, list[Any]] = {"pairs": pairs}
        for name, totals in zip(BY_TIMESTEP, rows[1:], strict=True):
            means = zip(totals, pairs, strict=True)
            by_timestep[name] = [total / n if n else None for total, n in means]
        counts = [int(n) for n in numbers[-SCALE_BUCKETS:]]
        return {TIMESTEPS_KEY: by_timestep, HISTOGRAM_KEY: counts}

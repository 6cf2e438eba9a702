"""Averaging a step's metrics over accumulation and processes with one synchronisation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

MINIMA = {"loser_scale_min"}


class StepMetrics:
    """Sums the metrics of an optimizer step's micro-steps on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._total: Tensor | None = None
        self._least: Tensor | None = None
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """One micro-step's detached scalars; the names must stay the same."""
        values = torch.stack([v.float() for v in metrics.values()])
        self._names = list(metrics)
        self._total = values if self._total is None else self._total + values
        self._least = values if self._least is None else torch.minimum(self._least, values)
        self.count += 1

    def reduce(
        self, accelerator: Accelerator, extra: dict[str, float], more: Tensor
    ) -> tuple[dict[str, float], dict[str, float], Tensor]:
        """Means over micro-steps and processes (minima for `MINIMA`), and sums over processes of
        `extra` and of `more`, (n,), the last on the CPU. Called by every process."""
        row = torch.cat([self._total / self.count, self._least])
        own = torch.tensor(list(extra.values()), device=row.device, dtype=row.dtype)
        gathered = accelerator.gather(torch.cat([row, own, more.to(row)])[None]).cpu()
        n = len(self._names)
        mean, least = gathered[:, :n].mean(0), gathered[:, n : 2 * n].amin(0)
        metrics = {
            name: (least if name in MINIMA else mean)[i].item()
            for i, name in enumerate(self._names)
        }
        sums, more_sums = gathered[:, 2 * n :].sum(0).split([len(extra), len(more)])
        return metrics, dict(zip(extra, sums.tolist(), strict=True)), more_sums

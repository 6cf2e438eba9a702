"""A step's metrics, averaged over accumulation and processes with one synchronisation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

MINIMA = {"loser_scale_min"}


def added(rows: list[Tensor]) -> Tensor:
    """Add tensors of one shape in their order."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


class StepMetrics:
    """Sums the metrics of an optimizer step's micro-steps on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []

    @property
    def count(self) -> int:
        """The number of micro-steps so far."""
        return len(self._rows)

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one micro-step's detached scalars; the names must stay the same."""
        self._names = list(metrics)
        self._rows.append(torch.stack([v.float() for v in metrics.values()]))

    def reduce(
        self, accelerator: Accelerator, extra: dict[str, float], more: Tensor
    ) -> tuple[dict[str, float], dict[str, float], Tensor]:
        """Average over micro-steps and processes (minima for `MINIMA`), and sum over processes
        `extra` and `more`, (n,), the last on the CPU. Called by every process."""
        row = torch.cat([added(self._rows) / self.count, torch.stack(self._rows).amin(0)])
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

"""Adafactor over sharded weights.

Its row and column means run over whole weights. So each process gathers one weight and its gradient
at a time, does the step that an unsharded run would, and keeps its own part. The factored state is
small and whole in every process: it is saved and loaded as that of any other run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from sdpo.training.sharding import divided


class ShardedAdafactor(Adafactor):
    """Its parameter groups hold stand-ins, which are empty but while their weight is stepped."""

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        self.sharded: list[Any] = list(parameters)
        self.stand_ins = [
            nn.Parameter(torch.empty(0, dtype=p.dtype, device=p.device)) for p in self.sharded
        ]
        super().__init__(self.stand_ins, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all weights, one after another. Called by every process."""
        (group,) = self.param_groups
        for parameter, stand_in in zip(self.sharded, self.stand_ins, strict=True):
            if parameter.grad is None:
                continue
            stand_in.data = parameter.full_tensor()
            stand_in.grad = parameter.grad.full_tensor()
            group["params"] = [stand_in]
            super().step()
            parameter.copy_(divided(stand_in.data, parameter))
            stand_in.grad, stand_in.data = None, stand_in.data.new_empty(0)
        group["params"] = self.stand_ins

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the sharded weights."""
        for parameter in self.sharded:
            parameter.grad = None

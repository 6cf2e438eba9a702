"""A moving average of the trained weights: after update n, a <- d a + (1 - d) w with decay
d = min(--ema_decay, n / (9 + n)), and d = 0 at the first (diffusers' EMAModel)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Ema:
    """The average of what is trained of `unet`, in the dtype and place of the weights themselves.

    Diffusers' warm-up is kept: d grows from zero, so that the start is soon forgotten.
    """

    def __init__(self, unet: nn.Module, decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        self.model = EMAModel(self.parameters, decay=decay)

    @property
    def averages(self) -> list[Tensor]:
        """In the order of the UNet's trained parameters."""
        return self.model.shadow_params

    def of(self, unet: nn.Module, averages: list[Tensor]) -> Ema:
        """The same average of another form of the UNet, such as a sharded or a gathered one."""
        other = copy.copy(self)
        other.parameters = [p for p in unet.parameters() if p.requires_grad]
        other.model = copy.copy(self.model)
        other.model.shadow_params = averages
        return other

    def update(self) -> None:
        """Once after each optimizer step that was applied."""
        self.model.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the UNet has the averages for weights; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self.parameters, self.model.shadow_params, strict=True):
            weight.data, average.data = average.data, weight.data

    @property
    def steps(self) -> int:
        """Updates so far; decay and average depend on it."""
        return self.model.optimization_step

    @steps.setter
    def steps(self, value: int) -> None:
        self.model.optimization_step = value

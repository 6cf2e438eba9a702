"""From the losses of a step's micro-batches to one gradient: summed, averaged over processes,
clipped."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from sdpo.training.sharding import whole


class Accumulation(Protocol):
    """What the training loop needs to know about it."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch's forward and backward pass; `last`: of the step."""

    def backward(self, loss: Tensor) -> None:
        """The backward pass of one micro-batch, whose loss is already its share of the step's."""

    def clip(self) -> Tensor | float:
        """After the last: the norm of the whole gradient before it is clipped, (). Called by every
        process."""


class OwnAccumulation:
    """In the parameters' `grad`, by torch and accelerate, sharded or not."""

    def __init__(self, accelerator: Accelerator, unet: nn.Module, max_norm: float) -> None:
        self.accelerator, self.unet, self.max_norm = accelerator, unet, max_norm
        self.parameters = [p for p in unet.parameters() if p.requires_grad]

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged at the last one alone."""
        return nullcontext() if last else self.accelerator.no_sync(self.unet)

    def backward(self, loss: Tensor) -> None:
        """Scaled, where the run is in fp16."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor:
        """Clips in place."""
        return whole(self.accelerator.clip_grad_norm_(self.parameters, self.max_norm))

"""Frozen models that live in the host's memory, on the device only while they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Offloaded:
    """A frozen model that lives on the CPU; its weights are on `device` for a call alone.

    They are copied there and dropped afterwards, nothing is copied back. On a GPU the originals lie
    in pinned memory. Values are not changed, so that the output is that of a model on `device`.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.tensors = [*module.parameters(), *module.buffers()]
        pin = device.type == "cuda"
        self.originals = [t.data.pin_memory() if pin else t.data for t in self.tensors]
        self._put_back()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, on `device`."""
        with self.on_device():
            return self.module(*args, **kwargs)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold the weights on `device` within it."""
        try:
            for tensor, original in zip(self.tensors, self.originals, strict=True):
                tensor.data = original.to(self.device, non_blocking=True)
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for tensor, original in zip(self.tensors, self.originals, strict=True):
            tensor.data = original

"""What a run is held against: the UNet it started from, in one of three forms."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sdpo.models.forward import make_reference
from sdpo.models.lora import AdaptersOff, add_adapters

# Called like a UNet, under no_grad.
Reference = Callable[..., Any]


def build_reference(
    unet: nn.Module, args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> Reference:
    """The reference of a run, made from the UNet that it starts from; puts `unet` on `device`.

    With --lora_rank, `unet` is given its adapters and the reference is itself without them; with
    --offload_reference it is a copy that lives on the CPU; else a copy on the device.

    Raises:
        UserError: a name of --lora_target_modules fits no layer.
    """
    if args.lora_rank:
        add_adapters(unet, args, dtype, device)
        return AdaptersOff(unet)
    if args.offload_reference:
        reference = Offloaded(make_reference(unet.to("cpu"), dtype), device)
        unet.to(device)
        return reference
    return make_reference(unet.to(device), dtype)


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
        try:
            for tensor, original in zip(self.tensors, self.originals, strict=True):
                tensor.data = original.to(self.device, non_blocking=True)
            return self.module(*args, **kwargs)
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for tensor, original in zip(self.tensors, self.originals, strict=True):
            tensor.data = original

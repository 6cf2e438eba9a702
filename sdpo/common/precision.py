"""Number formats: the names that flags take, and where they can be used."""

from __future__ import annotations

import torch
from torch import nn

from sdpo.common.errors import UserError

# "no" is what accelerate calls a run without mixed precision.
DTYPES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def check_precision(flag: str, name: str, device: torch.device) -> None:
    """Whether a device can compute in the format that a flag names.

    Raises:
        UserError: fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        instead = "no" if flag == "--mixed_precision" else "fp32"
        raise UserError(f"{flag} fp16 needs a GPU: on a CPU use bf16 or {instead}")


def hold_frozen_products(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the convolutions and linear layers below `module` that are not trained, in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and not part.weight.requires_grad:
            part.to(dtype)

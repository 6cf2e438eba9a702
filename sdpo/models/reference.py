"""The frozen reference: the model that a run started from, in one of three forms."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sdpo.common.precision import hold_frozen_products
from sdpo.models.lora import AdaptersOff, add_adapters
from sdpo.models.noise import SETTINGS
from sdpo.models.offload import Offloaded

if TYPE_CHECKING:
    from sdpo.config import ModelConfig

# Called like a UNet, under no_grad.
Reference = Callable[..., Any]


def build_reference(
    unet: nn.Module,
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    needed: bool = True,
) -> Reference | None:
    """Make a run's reference from the UNet that it starts from; puts `unet` on `device`.

    With --lora_rank, `unet` is given its adapters and the reference is itself without them; with
    --offload_reference it is a copy that lives on the CPU; else a copy on the device. None where
    it is not `needed`.

    Raises:
        UserError: a name of --lora_target_modules fits no layer.
    """
    if config.lora_rank:
        add_adapters(unet, config, seed, dtype, device)
        return AdaptersOff(unet) if needed else None
    if not needed:
        unet.to(device)
        return None
    if config.offload_reference:
        reference = Offloaded(make_reference(unet.to("cpu"), dtype), device)
        unet.to(device)
        return reference
    return make_reference(unet.to(device), dtype)


def make_reference(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make a frozen copy of `unet` that takes the memory of `dtype`.

    Only the weights of convolutions and linear layers are cast: autocast casts those anyway, so the
    copy's output under autocast is that of the float32 original, and a run starts at margin zero.
    """
    reference = copy.deepcopy(unet).requires_grad_(False).eval()
    hold_frozen_products(reference, dtype)
    return reference


def weights_digest(module: nn.Module) -> str:
    """Compute what tells the float32 weights of two models apart, in hex: for each weight its name,
    shape, the sum of its bits as integers and some of its values. As fast as memory is read."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        flat = weight.detach().float().cpu().contiguous().flatten()
        # By numpy: torch widens all of it first, which takes ten times as long.
        bits = int(flat.view(torch.int32).numpy().sum(dtype=np.int64))
        digest.update(f"{name} {tuple(weight.shape)} {bits} ".encode())
        digest.update(flat[:: max(1, len(flat) // 64)].contiguous().numpy().tobytes())
    return digest.hexdigest()


def settings_of(unet: Any, scheduler: Any) -> dict[str, dict[str, Any]]:
    """List the settings of a denoiser and of the noise schedule that it is trained on, ready for
    JSON: by them the same weights are trained to something else."""
    noised = {k: v for k, v in scheduler.config.items() if k in SETTINGS}
    parts = {"denoiser": dict(unet.config), "scheduler": noised}
    if type(unet).__name__ == "UNet2DConditionModel":
        # It tells pipelines alone, and one that saves an old base again makes it 64.
        parts["denoiser"].pop("sample_size")
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(parts, default=str))
    return {
        part: {k: v for k, v in config.items() if not k.startswith("_")}
        for part, config in plain.items()
    }


def config_digest(module: Any) -> str:
    """Compute what tells the configurations of two models of diffusers apart, in hex: the settings
    that their files give, by which the same weights may compute something else."""
    config = dict(module.config)
    unsaid = config.get("_use_default_values") or ()
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in unsaid}
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()

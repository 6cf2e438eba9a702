"""FSDP2: weights, gradients and optimizer state of the trained UNet, each process holding its part.

A launch configuration asks for it (scripts/configs/fsdp2.yaml, zero2.yaml). The sharding itself is
torch's `fully_shard`, applied here rather than by accelerate, which leaves it out on CPUs: one way
for all devices. What is saved and loaded is whole, in the files and formats of any other run.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from sdpo.training.state import Models

# How a launch configuration reaches a process.
_USE, _VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
_RESHARD = "FSDP_RESHARD_AFTER_FORWARD"
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_NOT_SERVED = {
    "use_8bit_adam": "its state is already small, and cannot be divided",
    "channels_last": "sharded weights have the usual layout",
    "compile": "leave it out",
}
_KEYS_NOT_SERVED = {
    "offload_params": "--offload_reference takes the reference off the GPU",
    "activation_checkpointing": "--gradient_checkpointing does it",
}
_NOT_BY_DEEPSPEED = {
    "lora_rank": "adapters are small: use another configuration",
    "use_adafactor": "it needs whole weights; give --no-use_adafactor, or use --config fsdp2",
}
# Keys of deepspeed_config: what of them is served, and what to do instead.
_DEEPSPEED_KEYS = {
    "zero_stage": ("2", "use 2, or --config fsdp2, which divides the weights too"),
    "offload_optimizer_device": ("none", "use none"),
    "offload_param_device": ("none", "use none"),
    "config_file": ("none", "train.py's flags say what it would"),
}
# What one process holds whole at a time during a pass.
_UNITS = ("BasicTransformerBlock", "ResnetBlock2D")


@dataclass(frozen=True)
class Sharding:
    """`reshard`: weights are gathered anew for the backward pass and dropped after the forward
    pass; without it they stay whole in between (what DeepSpeed calls stage 2, without its
    engine)."""

    reshard: bool


def check_sharding(args: argparse.Namespace) -> Sharding | None:
    """What the launcher asks for; None: no sharding. Needs no torch.

    Raises:
        UserError: for the first version of FSDP, for a single process, or with flags that do not go
            with sharding.
    """
    if os.environ.get(_USE, "").lower() != "true":
        return None
    if os.environ.get(_VERSION, "1") != "2":
        raise UserError("FSDP: only version 2 is served; set fsdp_version: 2 in the configuration")
    for name, instead in _KEYS_NOT_SERVED.items():
        if os.environ.get(f"FSDP_{name.upper()}", "").lower() == "true":
            raise UserError(f"fsdp_{name} in the launch configuration is not served: {instead}")
    _check_flags(args, "FSDP2", _NOT_SERVED)
    if args.use_winner_preserving and args.winner_preserving_space == "parameter":
        raise UserError("--winner_preserving_space parameter does not go with FSDP2: use output")
    # Accelerate is to see ordinary processes.
    del os.environ[_USE]
    return Sharding(reshard=os.environ.get(_RESHARD, "true").lower() != "false")


def check_deepspeed(args: argparse.Namespace) -> bool:
    """Whether the launcher asks for DeepSpeed. Needs no torch.

    Raises:
        UserError: it is not installed, for what of it is not served, for a single process, or with
            flags that do not go with it.
    """
    if os.environ.get(_USE_DEEPSPEED, "").lower() != "true":
        return False
    if find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed: pip install deepspeed, or use --config zero2, the same "
            "division of gradients and optimizer state by torch itself"
        )
    for name, (served, instead) in _DEEPSPEED_KEYS.items():
        value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", served)
        if value.lower() != served:
            raise UserError(f"{name} {value} in the launch configuration is not served: {instead}")
    _check_flags(args, "DeepSpeed", {**_NOT_SERVED, **_NOT_BY_DEEPSPEED})
    # Accelerate is to see ordinary processes.
    del os.environ[_USE_DEEPSPEED]
    return True


def _check_flags(args: argparse.Namespace, engine: str, not_served: dict[str, str]) -> None:
    for name, instead in not_served.items():
        if getattr(args, name):
            raise UserError(f"--{name} does not go with {engine}: {instead}")
    if args.mixed_precision == "fp16":
        raise UserError(f"--mixed_precision fp16 does not go with {engine}: use bf16 or no")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError(
            f"{engine} needs more than one process: with one, use another configuration"
        )


def shard(unet: nn.Module, how: Sharding, device: torch.device, processes: int) -> nn.Module:
    """Divide a UNet on `device` over all processes, in place: each of its `_UNITS` on its own, so
    that one at a time is whole during a pass, and what is left as another.

    Returns: a copy of the UNet as it was, without memory for weights, for `gathered`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    skeleton = copy.deepcopy(unet, {id(p): _on_meta(p) for p in unet.parameters()})
    mesh = init_device_mesh(device.type, (processes,))
    for part in list(unet.modules()):
        if type(part).__name__ in _UNITS:
            fully_shard(part, mesh=mesh, reshard_after_forward=how.reshard)
    fully_shard(unet, mesh=mesh, reshard_after_forward=False)
    return skeleton


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return type(parameter)(parameter.detach().to("meta"), parameter.requires_grad)


def gathered(models: Models, accelerator: Accelerator) -> Models | None:
    """The models of a run with their UNet unwrapped and, where it is sharded, copies of UNet and
    average that are whole and on the CPU. Called by every process; None on all but the main one.
    """
    main = accelerator.is_main_process
    unet, ema = accelerator.unwrap_model(models.unet), models.ema
    if models.skeleton is not None:
        state = whole(unet.state_dict(), keep=main)
        averages = whole(ema.averages, keep=main) if ema else None
        if main:
            unet = copy.deepcopy(models.skeleton)
            unet.load_state_dict(state, assign=True)
            ema = ema.of(unet, averages) if ema else None
    return replace(models, unet=unet, ema=ema) if main else None


def whole(value: Any, keep: bool = True) -> Any:
    """`value` with every sharded tensor in it (in dicts and lists) gathered, on the CPU; others are
    left as they are. Called by every process.

    Args:
        keep: without it the result is of no use and takes no memory.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {k: whole(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v, keep) for v in value]
    return value


def divided(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor that every process has, divided as `parameter`, of the same shape, is; as it
    is where that is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    # Without a source nothing is sent: each process takes its part of its own.
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def divided_state(state: dict[Any, dict[str, Any]], parameters: list[Tensor]) -> dict[Any, Any]:
    """An optimizer's whole state, by the parameters' numbers, divided as these are."""

    def part(value: Any, parameter: Tensor) -> Any:
        same = getattr(value, "shape", None) == parameter.shape
        return divided(value, parameter) if same else value

    return {
        number: {name: part(value, parameters[number]) for name, value in entries.items()}
        for number, entries in state.items()
    }

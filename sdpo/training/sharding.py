"""FSDP2: weights, gradients and optimizer state of the trained UNet, each process holding its part.

A launch configuration asks for it (scripts/configs/fsdp2.yaml, zero2.yaml). The sharding itself is
torch's `fully_shard`, applied here rather than by accelerate, which leaves it out on CPUs: one way
for all devices. What is saved and loaded is whole, in the files and formats of any other run.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.config.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sdpo.config import TrainConfig

# How a launch configuration reaches a process.
_USE, _VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
_RESHARD = "FSDP_RESHARD_AFTER_FORWARD"
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_NOT_SERVED = {
    "use_8bit_adam": "its state is already small, and cannot be divided",
    "channels_last": "sharded weights have the usual layout",
    "compile": "leave it out",
    "quantize_base": "quantised weights cannot be divided",
}
_KEYS_NOT_SERVED = {
    "offload_params": "--offload_reference takes the reference off the GPU",
    "activation_checkpointing": "--gradient_checkpointing does it",
}
# What one process holds whole at a time during a pass.
_UNITS = frozenset(unit for facts in FAMILIES.values() for unit in facts.units)


@dataclass(frozen=True)
class Sharding:
    """How weights are divided. `reshard`: they are dropped after the forward pass and gathered anew
    for the backward pass; without it they stay whole in between (what DeepSpeed calls stage 2)."""

    reshard: bool


def launched_sharding(config: TrainConfig) -> Sharding | None:
    """Read from the environment what the launcher asks for; None: no sharding. Needs no torch.

    Raises:
        UserError: it asks for DeepSpeed or for the first version of FSDP, there is a single
            process, or a flag does not go with sharding.
    """
    if os.environ.get(_USE_DEEPSPEED, "").lower() == "true":
        raise UserError(
            "DeepSpeed's own engine is not served: use --config zero2, the same division of "
            "gradients and optimizer state by torch itself"
        )
    if os.environ.get(_USE, "").lower() != "true":
        return None
    if os.environ.get(_VERSION, "1") != "2":
        raise UserError("FSDP: only version 2 is served; set fsdp_version: 2 in the configuration")
    for name, instead in _KEYS_NOT_SERVED.items():
        if os.environ.get(f"FSDP_{name.upper()}", "").lower() == "true":
            raise UserError(f"fsdp_{name} in the launch configuration is not served: {instead}")
    flags = config.flags()
    for name, instead in _NOT_SERVED.items():
        if flags[name]:
            raise UserError(f"--{name} does not go with FSDP2: {instead}")
    if config.optim.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 does not go with FSDP2: use bf16 or no")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError("FSDP2 needs more than one process: with one, use another configuration")
    if config.safeguard.over_parameters:
        raise UserError("--winner_preserving_space parameter does not go with FSDP2: use output")
    return Sharding(reshard=os.environ.get(_RESHARD, "true").lower() != "false")


def shard(unet: Any, how: Sharding, device: torch.device, processes: int) -> nn.Module:
    """Divide a UNet on `device` over all processes, in place: each of its `_UNITS` on its own, so
    that one at a time is whole during a pass, and what is left as another.

    Returns: a copy of the UNet as it was, without memory for weights, for
    `sdpo.training.state.gathered`.
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


def whole(value: Any, keep: bool = True) -> Any:
    """Gather `value`: every sharded tensor in it (in dicts and lists) becomes whole, on the CPU;
    others are left as they are. Called by every process.

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
    """Divide a whole tensor that every process has as `parameter`, of the same shape, is divided;
    it is left as it is where that is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    # Without a source nothing is sent: each process takes its part of its own.
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def divided_state(state: dict[Any, dict[str, Any]], parameters: list[Tensor]) -> dict[Any, Any]:
    """Divide an optimizer's whole state, by the parameters' numbers, as these are divided."""

    def part(value: Any, parameter: Tensor) -> Any:
        same = getattr(value, "shape", None) == parameter.shape
        return divided(value, parameter) if same else value

    return {
        number: {name: part(value, parameters[number]) for name, value in entries.items()}
        for number, entries in state.items()
    }

"""FSDP2: weights, gradients and optimizer state of the trained UNet, each process holding its part.

A launch configuration asks for it (scripts/configs/fsdp2.yaml, zero2.yaml). The sharding itself is
torch's `fully_shard`, applied here rather than by accelerate, which leaves it out on CPUs: one way
for all devices. What is saved and loaded is whole, in the files and formats of any other run.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdpo.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# How a launch configuration reaches a process.
_USE, _VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
_RESHARD = "FSDP_RESHARD_AFTER_FORWARD"
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
# Flags that would need gathering, or a layout, of their own.
_NOT_SERVED = {
    "lora_rank": "adapters are small: use another configuration",
    "use_ema": "leave it out",
    "use_adafactor": "AdamW's state is divided over the processes; give --no-use_adafactor",
    "use_8bit_adam": "its state is already small, and cannot be divided",
    "channels_last": "sharded weights have the usual layout",
    "compile": "leave it out",
    "validation_prompts": "a sharded UNet draws only with all processes; draw from the checkpoints",
}


@dataclass(frozen=True)
class Sharding:
    """`reshard`: weights are gathered anew for the backward pass and dropped after the forward
    pass; without it they stay whole in between (what DeepSpeed calls stage 2, without its
    engine)."""

    reshard: bool


def check_sharding(args: argparse.Namespace) -> Sharding | None:
    """What the launcher asks for; None: no sharding. Needs no torch.

    Raises:
        UserError: for DeepSpeed and the first version of FSDP, for a single process, or with flags
            that do not go with sharding.
    """
    if os.environ.get(_USE_DEEPSPEED, "").lower() == "true":
        raise UserError(
            "DeepSpeed is not served: use --config zero2, the same division of gradients and "
            "optimizer state by torch itself, or --config fsdp2"
        )
    if os.environ.get(_USE, "").lower() != "true":
        return None
    if os.environ.get(_VERSION, "1") != "2":
        raise UserError("FSDP: only version 2 is served; set fsdp_version: 2 in the configuration")
    for name, instead in _NOT_SERVED.items():
        if getattr(args, name):
            raise UserError(f"--{name} does not go with FSDP2: {instead}")
    if args.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 does not go with FSDP2: use bf16 or no")
    if args.use_winner_preserving and args.winner_preserving_space == "parameter":
        raise UserError("--winner_preserving_space parameter does not go with FSDP2: use output")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError("FSDP2 needs more than one process: with one, use another configuration")
    # Accelerate is to see ordinary processes.
    del os.environ[_USE]
    return Sharding(reshard=os.environ.get(_RESHARD, "true").lower() != "false")


def shard(unet: nn.Module, how: Sharding, device: torch.device, processes: int) -> None:
    """Divide a UNet on `device` over all processes, in place: each of its blocks on its own, so
    that one block at a time is whole during a pass, and what is left as another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None:
            fully_shard(block, mesh=mesh, reshard_after_forward=how.reshard)
    fully_shard(unet, mesh=mesh, reshard_after_forward=False)


def is_sharded(unet: nn.Module) -> bool:
    """Whether `shard` was applied."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(unet, FSDPModule)


def whole(value: Any, keep: bool = True) -> Any:
    """`value` with every sharded tensor in it (in dicts and lists) gathered, on the CPU; others are
    left as they are. Called by every process.

    Args:
        keep: without it the result is of no use and takes no memory.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, dict):
        return {k: whole(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v, keep) for v in value]
    return value


def divided(state: dict[Any, dict[str, Any]], parameters: list[Tensor]) -> dict[Any, Any]:
    """An optimizer's whole state, by the parameters' numbers, divided as these are; as it is where
    they are not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    result = {}
    for number, entries in state.items():
        parameter = parameters[number]
        if not isinstance(parameter, DTensor):
            return state
        result[number] = {
            name: distribute_tensor(
                value.to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                # Every process has read it: none need be sent anything.
                src_data_rank=None,
            )
            if getattr(value, "shape", None) == parameter.shape
            else value
            for name, value in entries.items()
        }
    return result

"""train.py's flags that make a step faster or smaller and change nothing about what it computes."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from sdpo.common.errors import UserError

_SWITCH = argparse.BooleanOptionalAction


def add_speed_flags(group: argparse._ArgumentGroup) -> None:
    """Memory layout, compilation and the optimizer's implementation."""
    add = group.add_argument
    add(
        "--channels_last",
        action=_SWITCH,
        default=False,
        help="keep the convolutions' weights and images in channels-last order (faster where the "
        "convolution kernels want it, as with half precision on NVIDIA GPUs)",
    )
    add(
        "--compile",
        action=_SWITCH,
        default=False,
        help="torch.compile UNet and reference: minutes at the start, faster steps afterwards",
    )
    add(
        "--fused_optimizer",
        action=_SWITCH,
        default=False,
        help="AdamW in one kernel over all weights, where the device has one",
    )
    add(
        "--use_8bit_adam",
        action=_SWITCH,
        default=False,
        help="AdamW with 8-bit moments (a quarter of the optimizer's memory); needs bitsandbytes",
    )


def check_speed_flags(args: argparse.Namespace) -> None:
    """Checks that import nothing heavy.

    Raises:
        UserError: naming the flag and what would be right.
    """
    for name, what in (("use_8bit_adam", "8-bit"), ("fused_optimizer", "fused")):
        if getattr(args, name) and args.use_adafactor:
            raise UserError(
                f"--{name} is a {what} AdamW and --use_adafactor another optimizer: give one of "
                "them (--no-use_adafactor takes back a recipe's)"
            )
    if args.use_8bit_adam and args.fused_optimizer:
        raise UserError("--use_8bit_adam is always fused: leave --fused_optimizer out")
    if args.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise UserError(
            "--use_8bit_adam needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave the flag out"
        )

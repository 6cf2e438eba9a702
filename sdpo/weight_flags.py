"""train.py's flags that say which weights are trained, averaged and held against."""

from __future__ import annotations

import argparse
import math

from sdpo.common.errors import UserError

_SWITCH = argparse.BooleanOptionalAction
# The attention's projections, in both families.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_weight_flags(group: argparse._ArgumentGroup) -> None:
    """LoRA, DoRA, EMA and the reference."""
    add = group.add_argument
    add(
        "--lora_rank",
        type=int,
        metavar="N",
        help="train adapters of rank N instead of the UNet; the reference is then the same UNet "
        "without them, so that only one is in memory",
    )
    add(
        "--lora_alpha",
        type=float,
        metavar="A",
        help="adapters count times A / rank (default: the rank; programs that do not read "
        "diffusers' metadata take it for the rank)",
    )
    add("--lora_dropout", type=float, default=0.0, metavar="P", help="default: 0")
    add(
        "--use_dora",
        action=_SWITCH,
        default=False,
        help="DoRA: adapters for the direction of the weights, their length trained beside it",
    )
    add(
        "--lora_target_modules",
        nargs="+",
        metavar="NAME",
        help="linear layers and convolutions to adapt, by the end of their names in the UNet "
        f"(default: {' '.join(LORA_TARGETS)})",
    )
    add(
        "--use_ema",
        action=_SWITCH,
        default=False,
        help="keep a moving average of the trained weights too, float32 on the device, saved as "
        "unet_ema.pth and pipeline_ema/",
    )
    add("--ema_decay", type=float, default=0.9999, metavar="D", help="default: 0.9999")
    add(
        "--offload_reference",
        action=_SWITCH,
        default=False,
        help="keep the reference in the host's memory, on the device only while it is asked",
    )


def check_weight_flags(args: argparse.Namespace) -> None:
    """Checks that need no model; fills in what --lora_rank implies.

    Raises:
        UserError: naming the flag and what would be right.
    """
    if not 0.0 <= args.lora_dropout < 1.0:
        raise UserError(f"--lora_dropout must be at least 0 and below 1, got {args.lora_dropout}")
    if not 0.0 <= args.ema_decay < 1.0:
        raise UserError(f"--ema_decay must be at least 0 and below 1, got {args.ema_decay}")
    if args.lora_rank is None:
        _check_no_lora(args)
        return
    if args.lora_rank < 1:
        raise UserError(f"--lora_rank must be at least 1, got {args.lora_rank}")
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    if not (math.isfinite(args.lora_alpha) and args.lora_alpha > 0):
        raise UserError(f"--lora_alpha must be a number above 0, got {args.lora_alpha}")
    args.lora_target_modules = list(args.lora_target_modules or LORA_TARGETS)
    if args.offload_reference:
        raise UserError(
            "--offload_reference has no meaning with --lora_rank: the reference is the trained "
            "UNet without its adapters and takes no memory of its own"
        )


def _check_no_lora(args: argparse.Namespace) -> None:
    given = [name for name in ("lora_alpha", "lora_target_modules") if getattr(args, name)]
    given += [name for name in ("lora_dropout", "use_dora") if getattr(args, name)]
    if given:
        raise UserError(f"--{given[0]} has no meaning without --lora_rank")

"""What --channels_last, --compile, --fused_optimizer and --use_8bit_adam do.

None of them changes a formula; results differ from the plain path by rounding alone, since sums are
taken in another order (tests/training/test_speed.py states the bounds).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line
from sdpo.models.encoding import Encoder, ModelEncoder
from sdpo.models.reference import Reference

log = logging.getLogger(__name__)


def to_channels_last(unet: nn.Module, encoder: Encoder) -> None:
    """Give the 4-dimensional weights of UNet and VAE the memory order (N, H, W, C), in place.

    Activations follow the weights, and so does a reference that is copied from the UNet afterwards.
    Names, shapes and values stay; files are written in the usual order. An encoder that reads from
    a cache has no VAE.
    """
    unet.to(memory_format=torch.channels_last)
    if isinstance(encoder, ModelEncoder):
        encoder.frozen.vae.to(memory_format=torch.channels_last)


def compile_forward(unet: nn.Module, reference: Reference) -> None:
    """torch.compile UNet and reference in place.

    Unlike `torch.compile(module)` this wraps nothing: the names of weights in checkpoints, and what
    takes a module apart or copies it, do not notice.
    """
    # A reference on the CPU holds its module; one that is the UNet without adapters has none of
    # its own.
    for module in (unet, getattr(reference, "module", reference)):
        if isinstance(module, nn.Module):
            module.compile()


def build_adamw(
    parameters: Iterable[nn.Parameter], args: argparse.Namespace, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW as the flags want it: torch's own, its fused kernel, or bitsandbytes' 8-bit one.

    Raises:
        UserError: bitsandbytes cannot be imported, or cannot train on this device.
    """
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    parameters = list(parameters)
    if args.use_8bit_adam:
        return _adamw_8bit(parameters, settings)
    if args.fused_optimizer:
        try:
            return torch.optim.AdamW(parameters, fused=True, **settings)
        except RuntimeError as error:
            log.warning("--fused_optimizer: AdamW without it (%s)", first_line(error))
    return torch.optim.AdamW(parameters, **settings)


def _adamw_8bit(parameters: list[nn.Parameter], settings: dict[str, Any]) -> Any:
    # Its libraries are chosen and loaded on import: whatever fails there is the installation's.
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:
        raise UserError(
            f"--use_8bit_adam: bitsandbytes cannot be imported ({first_line(error)}); mend its "
            "installation or leave the flag out"
        ) from error
    return AdamW8bit(parameters, **settings)


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer's state the memory order of its weights, in place.

    A state that was saved without --channels_last and is loaded with it (or the other way round)
    has another order, and fused kernels take weights and state for equally ordered.

    Raises:
        UserError: on 8-bit moments, which are scaled by block of memory and so keep their order.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != weight.shape:
                continue
            if value.stride() == weight.stride():
                continue
            if value.dtype == torch.uint8:
                raise UserError(
                    "--use_8bit_adam: the checkpoint's 8-bit moments are in the order of a run "
                    "with the other setting of --channels_last: resume with that one"
                )
            ordered = torch.empty_like(weight, dtype=value.dtype, device=value.device)
            state[name] = ordered.copy_(value)

"""Optimizer and learning-rate schedule, as the recipes name them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line
from sdpo.config import OptimConfig
from sdpo.training.sharding import divided_state

log = logging.getLogger(__name__)

POLYNOMIAL_END = 1e-7  # diffusers' own


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Build AdamW, or with --use_adafactor Adafactor at a fixed rate (no relative step, no scaling
    by the parameters, clip threshold 1.0)."""
    parameters = list(parameters)
    if config.use_adafactor:
        return _adafactor_class(parameters)(
            parameters,
            lr=learning_rate,
            weight_decay=config.adam_weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    return build_adamw(parameters, config, learning_rate)


def _adafactor_class(parameters: list[nn.Parameter]) -> Any:
    from torch.distributed.tensor import DTensor

    if any(isinstance(p, DTensor) for p in parameters):
        from sdpo.training.sharded_adafactor import ShardedAdafactor

        return ShardedAdafactor
    from transformers.optimization import Adafactor

    return Adafactor


def build_adamw(
    parameters: list[nn.Parameter], config: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Build AdamW: torch's fused kernel unless --no-fused_optimizer or there is none for the
    weights' device and dtype, then its plain one; or bitsandbytes' 8-bit one.

    Raises:
        UserError: bitsandbytes cannot be imported, or cannot train on this device.
    """
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        return _adamw_8bit(parameters, settings)
    if config.fused_optimizer is not False:
        try:
            return torch.optim.AdamW(parameters, fused=True, **settings)
        except RuntimeError as error:
            level = logging.WARNING if config.fused_optimizer else logging.INFO
            log.log(level, "--fused_optimizer: AdamW without it (%s)", first_line(error))
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


def scaled_learning_rate(config: OptimConfig, num_processes: int) -> float:
    """Compute the rate to train at: with --scale_lr, --learning_rate is meant per pair."""
    if not config.scale_lr:
        return config.learning_rate
    pairs = num_processes * config.train_batch_size * config.gradient_accumulation_steps
    return config.learning_rate * pairs


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, max_train_steps: int
) -> Any:
    """Build --lr_scheduler over optimizer steps; it is stepped once for each, whatever the number
    of processes."""
    from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

    if config.lr_scheduler == "polynomial" and optimizer.defaults["lr"] <= POLYNOMIAL_END:
        # Its usual end would lie above the start.
        return get_polynomial_decay_schedule_with_warmup(
            optimizer, config.lr_warmup_steps, max_train_steps, lr_end=0.0
        )
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


def restore(
    optimizer: Any,
    scheduler: Any,
    training: dict[str, Any],
) -> None:
    """Load what a checkpoint stored of both. Learning rate, weight decay and the like stay those
    of this run's flags: where they were changed on resuming, the new ones count."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = divided_state(training["optimizer"]["state"], parameters)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    follow_layout(optimizer)
    scheduler.load_state_dict({**training["scheduler"], "base_lrs": scheduler.base_lrs})
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates

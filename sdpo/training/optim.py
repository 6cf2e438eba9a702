"""Optimizer and learning-rate schedule, as the recipes name them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sdpo.training.sharding import divided_state
from sdpo.training.speed import build_adamw, follow_layout


def build_optimizer(
    parameters: Iterable[nn.Parameter], args: argparse.Namespace, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW, or with --use_adafactor Adafactor at a fixed rate (no relative step, no scaling by the
    parameters, clip threshold 1.0)."""
    parameters = list(parameters)
    if args.use_adafactor:
        return _adafactor_class(parameters)(
            parameters,
            lr=learning_rate,
            weight_decay=args.adam_weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    return build_adamw(parameters, args, learning_rate)


def _adafactor_class(parameters: list[nn.Parameter]) -> type[torch.optim.Optimizer]:
    from torch.distributed.tensor import DTensor

    if any(isinstance(p, DTensor) for p in parameters):
        from sdpo.training.sharded_adafactor import ShardedAdafactor

        return ShardedAdafactor
    from transformers.optimization import Adafactor

    return Adafactor


def scaled_learning_rate(args: argparse.Namespace, num_processes: int) -> float:
    """The rate to train at: with --scale_lr, --learning_rate is meant per pair."""
    if not args.scale_lr:
        return args.learning_rate
    pairs = num_processes * args.train_batch_size * args.gradient_accumulation_steps
    return args.learning_rate * pairs


def build_scheduler(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, max_train_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """--lr_scheduler over optimizer steps; it is stepped once for each, whatever the number of
    processes."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


def restore(
    optimizer: Any,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    training: dict[str, Any],
) -> None:
    """Load what `Trainer.save` stored of both. Learning rate, weight decay and the like stay those
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

"""The winner-preserving safeguard of Diffusion-SDPO (Fu et al., arXiv 2511.03317).

For a squared error, the gradient at the model's output is proportional to the residual
r = prediction - target. A step along -g_w + lam * g_l leaves the winner's loss falling to first
order, by at least a share mu of what the winner alone would give, when

    <g_w, -g_w + lam * g_l>  <=  -mu * |g_w|^2 .

The largest lam in [0, 1] with that property is

    lam = clamp((1 - mu) * |r_w|^2 / <r_w, r_l>, 0, 1)   where <r_w, r_l> > 0, else 1 .

This file knows tensors only: no method, no model, no trainer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scope = Literal["batch", "pair"]
SCOPES: tuple[Scope, ...] = ("batch", "pair")


def loser_scale(
    residual_w: Tensor, residual_l: Tensor, mu: float, scope: Scope = "batch"
) -> Tensor:
    """Scale for the loser branch's backward signal.

    Args:
        residual_w: the winners' residuals, prediction - target, (B, ...), any float dtype.
        residual_l: the losers' residuals, same shape.
        mu: share of the winner's own first-order decrease that must remain, in [0, 1].
        scope: "batch": one scale for all pairs given; "pair": one scale per pair, which holds
            whatever weights the loss gives to the pairs.

    Returns:
        The scale in [0, 1], detached, float32 (float64 for float64 input): shape () for "batch",
        (B,) for "pair".

    Raises:
        ValueError: on mu outside [0, 1], an unknown scope or shapes that differ.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if residual_w.shape != residual_l.shape:
        raise ValueError(
            f"residuals must have equal shapes, got {tuple(residual_w.shape)} "
            f"and {tuple(residual_l.shape)}"
        )
    accumulate = torch.promote_types(residual_w.dtype, torch.float32)
    w = residual_w.detach().to(accumulate).flatten(1 if scope == "pair" else 0)
    l = residual_l.detach().to(accumulate).flatten(1 if scope == "pair" else 0)  # noqa: E741
    return scale_from_products((w * w).sum(-1), (w * l).sum(-1), mu)


def scale_from_products(winner_sq: Tensor, inner: Tensor, mu: float) -> Tensor:
    """The rule itself, in whatever space the two products were taken.

    Args:
        winner_sq: |g_w|^2, any shape, detached, float32 or better.
        inner: <g_w, g_l>, same shape.
        mu: share of the winner's own first-order decrease that must remain, in [0, 1].

    Returns:
        The scale in [0, 1], same shape; NaN where a product is NaN or both are infinite.

    Raises:
        ValueError: on mu outside [0, 1].
    """
    if not 0.0 <= mu <= 1.0:
        raise ValueError(f"mu must lie in [0, 1], got {mu}")
    # Where the branches do not conflict the quotient is not taken: no epsilon is needed, and none
    # is added, since its weight would depend on the tensor's size.
    conflict = ~(inner <= 0)  # NaN stays NaN
    quotient = (1.0 - mu) * winner_sq / torch.where(conflict, inner, torch.ones_like(inner))
    return torch.where(conflict, quotient, torch.ones_like(quotient)).clamp(0.0, 1.0)


def scale_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """`value` unchanged, its gradient multiplied by `scale`: sg(v) + scale * (v - sg(v)).

    Args:
        value: (B,) per-sample losers' errors (any shape that broadcasts with `scale`).
        scale: () or (B,), detached.
    """
    constant = value.detach()
    return constant + scale.to(value.dtype) * (value - constant)

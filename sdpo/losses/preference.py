"""The function that trainers call: a preference loss over pairs, with or without the safeguard."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdpo.losses import method_names

if TYPE_CHECKING:
    from torch import Tensor

    from sdpo.losses.safeguard import Scope


@dataclass(frozen=True)
class LossOutput:
    """What `preference_loss` gives: `loss`, the scalar to backpropagate. The others are detached:
    `metrics`, scalars for the log; `per_pair`, winner_drift, loser_drift and loser_scale of each
    pair, (B,); `scale`, the loser's scale as it was taken, () or (B,)."""

    loss: Tensor
    metrics: dict[str, Tensor]
    per_pair: dict[str, Tensor]
    scale: Tensor


def get_method(name: str) -> ModuleType:
    """Import the module of a method.

    Raises:
        ValueError: no file of that name in `sdpo/losses/`.
    """
    if name not in method_names():
        raise ValueError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    return import_module(f"sdpo.losses.{name.replace('-', '_')}")


def trains_losers(name: str) -> bool:
    """Say whether a method's losers get a gradient.

    Raises:
        ValueError: there is no method of that name.
    """
    return bool(getattr(get_method(name), "USES_LOSERS", True))


def _options_of(module: ModuleType) -> set[str]:
    """The keyword-only parameters of a method's loss."""
    parameters = inspect.signature(module.loss).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _own_options(module: ModuleType, options: dict[str, Any]) -> dict[str, Any]:
    own = _options_of(module)
    if options.keys() - own:
        known = set().union(*(_options_of(get_method(name)) for name in method_names()))
        if unknown := options.keys() - known:
            raise TypeError(f"no method takes {', '.join(sorted(unknown))}")
    return {name: value for name, value in options.items() if name in own}


def preference_loss(
    method: str,
    model_pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    *,
    beta: float,
    mu: float | None = None,
    scope: Scope = "batch",
    fixed_scale: float | Tensor | None = None,
    ref_errors: Tensor | None = None,
    loser_weights: Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """Compute a preference loss over B pairs, with or without the winner-preserving safeguard.

    Args:
        method: "diffusion-dpo", "dspo", "dmpo", "sft", or any other file of `sdpo/losses/`.
        model_pred: the trained UNet's output, (2B, C, H, W), the B winners first, then their
            losers, any float dtype; everything is accumulated in float32 or better.
        ref_pred: the frozen reference's output, same shape; or None, and `ref_errors`.
        target: what the outputs are compared with (the noise), same shape. Both branches of a pair
            share one timestep and one noise.
        beta: strength of the implicit KL constraint.
        mu: the safeguard's share, in [0, 1]; None: safeguard off.
        scope: of the safeguard, "batch" or "pair" (see `sdpo.loser_scale`).
        fixed_scale: instead of `mu`, the loser's scale itself, in [0, 1] (a tensor's values are not
            looked at): a number or () for all pairs, (B,) for each.
        ref_errors: instead of `ref_pred`, its mean squared errors against `target`, (2B,), winners
            first, for methods that need no more (all but DSPO).
        loser_weights: (B,), further factors of the losers' gradients, as 1 / p with probability p
            and else 0; the loss and its metrics are as without.
        options: what one method alone takes and the others ignore: DMPO's `alpha` (smoothing of the
            target distribution, default 0), DSPO's `form` ("sd15", the default, or "sdxl").

    Returns:
        The loss, and metrics: loss, winner_mse, loser_mse, ref_winner_mse, ref_loser_mse,
        winner_drift (L_w - Lref_w), loser_drift, margin, implicit_acc (share of pairs with u > 0),
        loser_scale (mean) and loser_scale_min.

    Raises:
        ValueError: shapes that differ or are not pairs, an unknown method, scope or form, mu or
            a number for fixed_scale outside [0, 1], both of them given, both or none of `ref_pred`
            and `ref_errors`, or errors alone for a method that needs more.
        TypeError: an option that no method takes.
    """
    import torch

    from sdpo.losses.safeguard import loser_scale, scale_gradient
    from sdpo.losses.terms import PairTerms, as_accumulated, branch_errors, per_sample_mse

    module = get_method(method)
    own = _own_options(module, options)
    if (ref_pred is None) == (ref_errors is None):
        raise ValueError("give ref_pred or ref_errors, one of them")
    shapes = [tuple(t.shape) for t in (model_pred, ref_pred, target) if t is not None]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"model_pred, ref_pred and target must have equal shapes, got {str(shapes)[1:-1]}"
        )
    if model_pred.ndim < 2 or len(model_pred) == 0 or len(model_pred) % 2:
        raise ValueError(f"predictions must be (2B, ...), winners then losers, got {shapes[0]}")
    if ref_errors is not None:
        if getattr(module, "USES_REFERENCE_OUTPUT", False):
            raise ValueError(f"{method} needs ref_pred: the reference's errors are not enough")
        if ref_errors.shape != (len(model_pred),):
            raise ValueError(
                f"ref_errors must be ({len(model_pred)},), got {tuple(ref_errors.shape)}"
            )
    if fixed_scale is not None:
        _check_fixed_scale(fixed_scale, mu, len(model_pred) // 2)

    pred_w, pred_l = as_accumulated(model_pred).chunk(2)
    target_w, target_l = as_accumulated(target.detach()).chunk(2)
    residual_w, residual_l = pred_w - target_w, pred_l - target_l
    error_w, error_l = per_sample_mse(residual_w), per_sample_mse(residual_l)
    ref_pred_w = None
    if ref_pred is not None:
        ref_pred_w = as_accumulated(ref_pred.detach()).chunk(2)[0]
        ref_errors = branch_errors(ref_pred.detach(), target.detach())
    assert ref_errors is not None
    ref_error_w, ref_error_l = as_accumulated(ref_errors.detach()).chunk(2)

    scale = torch.ones((), dtype=error_l.dtype, device=error_l.device)
    if mu is not None:
        scale = loser_scale(residual_w, residual_l, mu, scope)
    elif fixed_scale is not None:
        scale = torch.as_tensor(fixed_scale, dtype=error_l.dtype, device=error_l.device).detach()
    if mu is not None or fixed_scale is not None:
        error_l = scale_gradient(error_l, scale)
    if loser_weights is not None:
        error_l = scale_gradient(error_l, loser_weights.to(error_l))

    terms = PairTerms(
        pred_w=pred_w,
        ref_pred_w=ref_pred_w,
        residual_w=residual_w,
        error_w=error_w,
        error_l=error_l,
        ref_error_w=ref_error_w,
        ref_error_l=ref_error_l,
        beta=beta,
    )
    loss = module.loss(terms, **own)
    with torch.no_grad():
        winner_drift, loser_drift = error_w - ref_error_w, error_l - ref_error_l
        metrics = {
            "loss": loss,
            "winner_mse": error_w.mean(),
            "loser_mse": error_l.mean(),
            "ref_winner_mse": ref_error_w.mean(),
            "ref_loser_mse": ref_error_l.mean(),
            "winner_drift": winner_drift.mean(),
            "loser_drift": loser_drift.mean(),
            "margin": terms.margin.mean(),
            "implicit_acc": (terms.u > 0).to(error_w.dtype).mean(),
            "loser_scale": scale.mean(),
            "loser_scale_min": scale.min(),
        }
        per_pair = {
            "winner_drift": winner_drift,
            "loser_drift": loser_drift,
            "loser_scale": scale.expand(error_l.shape),
        }
    return LossOutput(
        loss, {name: value.detach() for name, value in metrics.items()}, per_pair, scale
    )


def _check_fixed_scale(scale: float | Tensor, mu: float | None, pairs: int) -> None:
    if mu is not None:
        raise ValueError("give mu or fixed_scale, not both")
    if isinstance(scale, int | float):
        if not 0.0 <= scale <= 1.0:
            raise ValueError(f"fixed_scale must lie in [0, 1], got {scale}")
    elif scale.shape not in ((), (pairs,)):
        raise ValueError(f"fixed_scale must be () or ({pairs},), got {tuple(scale.shape)}")

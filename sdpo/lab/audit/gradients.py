"""The two branches of one batch of pairs, apart, as gradients over the parameters.

Through the UNet's output a preference loss reaches the parameters by two ways, the winners' outputs
and the losers'. With J the Jacobian of an output in the parameters and c the loss's gradient at it,

    gradient of the loss  =  J_w^T c_w  +  lam * J_l^T c_l ,

lam being what the safeguard, or a fixed number, leaves of the losers' part (arXiv 2511.03317).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdpo.losses.preference import preference_loss
from sdpo.losses.safeguard import loser_scale, scale_from_products
from sdpo.models.forward import NoisedPairs, predict

# One tensor per parameter, in the order of the list of parameters that they were asked for.
Gradients = list[Tensor]
WEIGHTED = "weighted"


@dataclass(frozen=True)
class Branches:
    """Of B pairs; gradients are those of means over the pairs."""

    winner_error: Gradients  # of L_w
    loser_error: Gradients  # of L_l
    winner_part: Gradients  # J_w^T c_w
    loser_part: Gradients  # J_l^T c_l, unscaled
    loser_part_by_pair: Gradients  # sum over pairs of lam_i J_l,i^T c_l,i, scope "pair"
    batch_scale: float  # lam of scope "batch"
    pair_scales: Tensor  # (B,) lam_i of scope "pair"


@dataclass(frozen=True)
class Mode:
    """One way of treating the losers: its scale (mean over pairs) and the loss's gradient."""

    scale: float
    gradient: Gradients


def branches(
    unet: nn.Module,
    parameters: Sequence[nn.Parameter],
    inputs: NoisedPairs,
    reference: Tensor,
    args: argparse.Namespace,
    form: str,
) -> Branches:
    """One forward pass over B pairs and five backward passes.

    Args:
        reference: the frozen reference's output, (2B, C, h, w).
        args: train.py's; of them method, beta, alpha and mu count.
        form: of DSPO, see `preference_loss`.
    """
    prediction = predict(unet, inputs)
    output = prediction.detach().requires_grad_()
    loss = preference_loss(
        args.train_method,
        output,
        reference,
        inputs.target,
        beta=args.beta_dpo,
        alpha=args.dmpo_alpha,
        form=form,
    ).loss
    (at_output,) = torch.autograd.grad(loss, output)
    half = len(output) // 2
    residual = prediction.detach() - inputs.target
    # Of the mean over pairs of the mean over pixels of r^2.
    at_error = 2.0 * residual / residual[:half].numel()
    mu = args.winner_preserving_mu
    pair_scales = loser_scale(residual[:half], residual[half:], mu, "pair")
    per_pixel = pair_scales.reshape(-1, *[1] * (residual.ndim - 1))

    def pulled_back(winners: Tensor | None = None, losers: Tensor | None = None) -> Gradients:
        none = torch.zeros_like(at_output[:half])
        cotangent = torch.cat(
            [none if winners is None else winners, none if losers is None else losers]
        )
        return list(torch.autograd.grad(prediction, parameters, cotangent, retain_graph=True))

    return Branches(
        winner_error=pulled_back(winners=at_error[:half]),
        loser_error=pulled_back(losers=at_error[half:]),
        winner_part=pulled_back(winners=at_output[:half]),
        loser_part=pulled_back(losers=at_output[half:]),
        loser_part_by_pair=pulled_back(losers=per_pixel * at_output[half:]),
        batch_scale=loser_scale(residual[:half], residual[half:], mu, "batch").item(),
        pair_scales=pair_scales,
    )


def inner(a: Gradients, b: Gradients) -> float:
    """<a, b> over all parameters, summed in float64 over tensors."""
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)).item()


def modes(found: Branches, mu: float, fixed: Sequence[float]) -> dict[str, Mode]:
    """Every way of treating the losers of one batch.

    "none": as the method is published; "fixed C": scaled by a constant; "batch", "pair": the
    safeguard at the output; "parameter": (1 - mu) |g_w|^2 / <g_w, g_l>, with the gradients g of L_w
    and L_l over the parameters; "weighted": the largest scale with

        <g_w, J_w^T c_w + lam J_l^T c_l>  >=  mu <g_w, J_w^T c_w> ,

    the same demand put on the loss's own gradient, in which pairs have different weights.
    """
    result = {"none": Mode(1.0, _combined(found, 1.0))}
    for c in fixed:
        result[f"fixed {c:g}"] = Mode(c, _combined(found, c))
    result["batch"] = Mode(found.batch_scale, _combined(found, found.batch_scale))
    pair_gradient = _sum(found.winner_part, found.loser_part_by_pair, 1.0)
    result["pair"] = Mode(found.pair_scales.mean().item(), pair_gradient)
    parameter = _scale(
        inner(found.winner_error, found.winner_error),
        inner(found.winner_error, found.loser_error),
        mu,
    )
    result["parameter"] = Mode(parameter, _combined(found, parameter))
    weighted = _scale(
        inner(found.winner_error, found.winner_part),
        -inner(found.winner_error, found.loser_part),
        mu,
    )
    result[WEIGHTED] = Mode(weighted, _combined(found, weighted))
    return result


def _scale(own: float, conflict: float, mu: float) -> float:
    products = torch.tensor([own, conflict], dtype=torch.float64)
    return scale_from_products(*products, mu).item()


def _combined(found: Branches, scale: float) -> Gradients:
    return _sum(found.winner_part, found.loser_part, scale)


def _sum(a: Gradients, b: Gradients, scale: float) -> Gradients:
    return [x + scale * y for x, y in zip(a, b, strict=True)]

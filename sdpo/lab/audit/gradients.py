"""The two branches of one batch of pairs, apart, as gradients over the parameters.

Through the UNet's output a preference loss reaches the parameters by two ways, the winners' outputs
and the losers'. With J the Jacobian of an output in the parameters and c the loss's gradient at it,

    gradient of the loss  =  J_w^T c_w  +  lam * J_l^T c_l ,

lam being what the safeguard, or a fixed number, leaves of the losers' part (arXiv 2511.03317).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpo.config.method import MethodConfig
from sdpo.losses.preference import preference_loss
from sdpo.losses.safeguard import loser_scale, scale_from_products
from sdpo.models.base import Family
from sdpo.models.forward import NoisedPairs, predict
from sdpo.training.parameter_safeguard import inner_product

# One tensor per parameter, in the order of the list of parameters that they were asked for.
Gradients = list[Tensor]
# Tensors by the names of their parameters.
Parameters = dict[str, Tensor]
WEIGHTED = "weighted"


@dataclass(frozen=True)
class _Placed:
    """A model that is called with `parameters` in the place of its own."""

    module: nn.Module
    parameters: Parameters

    def __call__(self, *args: object, **kwargs: object) -> object:
        return functional_call(self.module, self.parameters, args, kwargs)


@dataclass(frozen=True)
class Network:
    """One model of a family as a function of its trained parameters."""

    family: Family
    model: nn.Module

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def named(self, tensors: Sequence[Tensor]) -> Parameters:
        """Name tensors, one a parameter, as the parameters are."""
        return dict(zip(self.parameters, tensors, strict=True))

    def values(self) -> Parameters:
        """Give the parameters as they are, detached."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def predict(self, inputs: NoisedPairs) -> Tensor:
        """Call the model on noised samples; its output has the shape of `inputs.noisy`."""
        return predict(self.family, self.model, inputs)

    def predict_at(self, parameters: Parameters, inputs: NoisedPairs) -> Tensor:
        """Call the model with `parameters` in the place of its own."""
        return predict(self.family, _Placed(self.model, parameters), inputs)


def derivative(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> Tensor:
    """Compute the directional derivative of `function`, by forward-mode differentiation."""
    # Of the attention kernels only the plain one has a forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return jvp(function, (at,), (along,))[1]


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
    network: Network, inputs: NoisedPairs, reference: Tensor, method: MethodConfig, mu: float
) -> Branches:
    """Take the two branches of B pairs apart, by one forward pass and five backward passes.

    Args:
        reference: the frozen reference's output, (2B, C, h, w).
        mu: of the safeguard's scales.
    """
    parameters = list(network.parameters.values())
    prediction = network.predict(inputs)
    output = prediction.detach().requires_grad_()
    loss = preference_loss(
        method.train_method,
        output,
        reference,
        inputs.target,
        beta=method.beta_dpo,
        **method.options(network.family.name),
    ).loss
    (at_output,) = torch.autograd.grad(loss, output)
    half = len(output) // 2
    residual = prediction.detach() - inputs.target
    # Of the mean over pairs of the mean over pixels of r^2.
    at_error = 2.0 * residual / residual[:half].numel()
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
    """Compute <a, b> over all parameters in float64, one parameter after another."""
    return inner_product((x.double() for x in a), (y.double() for y in b)).item()


def modes(found: Branches, mu: float, fixed: Sequence[float]) -> dict[str, Mode]:
    """Treat the losers of one batch in every way.

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
    winner, both = torch.tensor([own, conflict], dtype=torch.float64)
    return scale_from_products(winner, both, mu).item()


def _combined(found: Branches, scale: float) -> Gradients:
    return _sum(found.winner_part, found.loser_part, scale)


def _sum(a: Gradients, b: Gradients, scale: float) -> Gradients:
    return [x + scale * y for x, y in zip(a, b, strict=True)]

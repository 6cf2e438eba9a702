"""From a gradient to the step that an optimizer would make of it, as one displacement of the
parameters, and what that does to the winners' errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpo.common.errors import UserError
from sdpo.config.optim import OptimConfig
from sdpo.lab.audit.gradients import Gradients, Network, Parameters, derivative, inner
from sdpo.losses.terms import as_accumulated, per_sample_mse
from sdpo.models.forward import NoisedPairs
from sdpo.training.checkpoint_paths import UNET_FILE

UPDATES = ("gradient", "preconditioned", "adam")


@dataclass
class Moments:
    """AdamW's state before the step: its two averages and the number of steps behind it."""

    first: Gradients
    second: Gradients
    steps: int

    @classmethod
    def none(cls, parameters: Sequence[Tensor]) -> Moments:
        """Make those of an optimizer that has made no step."""
        zeros = [torch.zeros_like(p) for p in parameters]
        return cls(zeros, [z.clone() for z in zeros], 0)

    @classmethod
    def read(cls, training: dict[str, Any], parameters: Sequence[Tensor], where: Path) -> Moments:
        """Read those of a checkpoint's optimizer.pt.

        Raises:
            UserError: it holds no AdamW state of these parameters.
        """
        state = training.get("optimizer", {}).get("state", {})
        shapes = [p.shape for p in parameters]
        moments = [state.get(i, {}) for i in range(len(shapes))]
        for name in ("exp_avg", "exp_avg_sq"):
            if [getattr(m.get(name), "shape", None) for m in moments] != shapes:
                raise UserError(
                    f"--checkpoint: {where} holds no AdamW state of this UNet; give the file "
                    f"{UNET_FILE} in it, and the moments are estimated"
                )
        device = parameters[0].device
        first = [m["exp_avg"].to(device, torch.float32) for m in moments]
        second = [m["exp_avg_sq"].to(device, torch.float32) for m in moments]
        return cls(first, second, int(moments[0]["step"]))

    def after(self, gradient: Gradients, optim: OptimConfig) -> Moments:
        """Take in one more gradient, already clipped."""
        b1, b2 = optim.adam_beta1, optim.adam_beta2
        first = [b1 * m + (1 - b1) * g for m, g in zip(self.first, gradient, strict=True)]
        second = [b2 * v + (1 - b2) * g * g for v, g in zip(self.second, gradient, strict=True)]
        return Moments(first, second, self.steps + 1)


def clipped(gradient: Gradients, limit: float) -> Gradients:
    """Shorten a gradient to at most `limit`, as `clip_grad_norm_` does it."""
    norm = inner(gradient, gradient) ** 0.5
    factor = min(1.0, limit / (norm + 1e-6))
    return [factor * g for g in gradient]


def displacements(
    gradient: Gradients,
    parameters: Sequence[Tensor],
    moments: Moments,
    optim: OptimConfig,
    learning_rate: float,
) -> dict[str, Gradients]:
    """Compute what one step would add to the parameters, with g the gradient clipped to
    --max_grad_norm.

    "adam": AdamW's step, with momentum and weight decay, as the optimizer makes it;
    "preconditioned": -lr * g / (sqrt(v) + eps), the same without momentum and decay;
    "gradient": -lr * g, plain gradient descent.
    """
    g = clipped(gradient, optim.max_grad_norm)
    now = moments.after(g, optim)
    bias1 = 1 - optim.adam_beta1**now.steps
    bias2 = 1 - optim.adam_beta2**now.steps
    divisors = [(v / bias2).sqrt() + optim.adam_epsilon for v in now.second]
    preconditioned = [-learning_rate * x / d for x, d in zip(g, divisors, strict=True)]
    adam = [
        -learning_rate * (optim.adam_weight_decay * p.detach() + m / bias1 / d)
        for p, m, d in zip(parameters, now.first, divisors, strict=True)
    ]
    descent = [-learning_rate * x for x in g]
    return {"gradient": descent, "preconditioned": preconditioned, "adam": adam}


class WinnerErrors:
    """The winners' errors of one batch as a function of the parameters."""

    def __init__(self, network: Network, batch: NoisedPairs) -> None:
        self.network, self.batch = network, batch.half(0)
        self.parameters = network.values()
        self.before = self._measured(self.parameters)

    def _errors(self, parameters: Parameters) -> Tensor:
        prediction = self.network.predict_at(parameters, self.batch)
        return per_sample_mse(as_accumulated(prediction) - self.batch.target)

    def _measured(self, parameters: Parameters) -> Tensor:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return self._errors(parameters)

    def first_order(self, displacement: Gradients) -> Tensor:
        """Compute the directional derivative of each winner's error along `displacement`, (B,)."""
        return derivative(self._errors, self.parameters, self.network.named(displacement))

    def realised(self, displacement: Gradients) -> Tensor:
        """Compute by how much each winner's error really changes when the step is made, (B,)."""
        steps = zip(self.parameters.items(), displacement, strict=True)
        return self._measured({name: p + d for (name, p), d in steps}) - self.before

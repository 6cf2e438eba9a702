"""What every preference loss is made of: a pair's predictions, errors and implicit reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairTerms:
    """One batch of B pairs, winners (w) and losers (l) apart, in float32 or better.

    `error_l` may carry a gradient scaled by the safeguard; its value is never changed. A loss must
    let the loser in through `error_l` (or `u`) alone, so that the safeguard sees all of it.
    """

    pred_w: Tensor  # (B, C, H, W), UNet output
    # (B, C, H, W), frozen reference's output, no gradient; None where its errors alone are known
    ref_pred_w: Tensor | None
    residual_w: Tensor  # (B, C, H, W), pred_w - target
    error_w: Tensor  # (B,), mean of residual_w^2
    error_l: Tensor  # (B,), mean of residual_l^2
    ref_error_w: Tensor  # (B,)
    ref_error_l: Tensor  # (B,)
    beta: float

    @property
    def ref_w(self) -> Tensor:
        """The reference's output for the winners, (B, C, H, W). A method whose loss asks for it
        says so by `USES_REFERENCE_OUTPUT = True`.

        Raises:
            ValueError: the reference's errors alone are known.
        """
        if self.ref_pred_w is None:
            raise ValueError("this loss needs the reference's output, not its errors alone")
        return self.ref_pred_w

    @property
    def margin(self) -> Tensor:
        """delta = (L_w - L_l) - (Lref_w - Lref_l), (B,); negative where the pair is learnt."""
        return (self.error_w - self.error_l) - (self.ref_error_w - self.ref_error_l)

    @property
    def u(self) -> Tensor:
        """u = -0.5 * beta * delta, (B,): the implicit reward's logit that the winner wins."""
        return -0.5 * self.beta * self.margin


def as_accumulated(x: Tensor) -> Tensor:
    """float32 for half types, float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def branch_errors(pred: Tensor, target: Tensor) -> Tensor:
    """Compute the errors (2B,) of predictions (2B, ...), winners and losers apart: how a sum over
    pixels is rounded may depend on the number of samples."""
    both = zip(as_accumulated(pred).chunk(2), as_accumulated(target).chunk(2), strict=True)
    return torch.cat([per_sample_mse(branch - wanted) for branch, wanted in both])


def per_sample_mse(residual: Tensor) -> Tensor:
    """(B, ...) residuals to (B,) errors: mean of squares over channels and pixels."""
    return residual.square().flatten(1).mean(1)

"""DSPO: Zhu et al., "Direct Score Preference Optimization for Diffusion Models", ICLR 2025.

SD1.5 form, with d = pred_w - ref_w:

    loss = mean over pixels and pairs of  ( r_w - beta * (1 - sigmoid(u)) * d )^2

SDXL form, as in the official code of Diffusion-SDPO:

    loss = mean of ( (1 - sigmoid(u)) * d )^2   if the batch mean of d^2 is at least 0.1,
           mean of   (1 - sigmoid(u))^2         otherwise.

The loser enters through u. At beta of 0.001 (the SD1.5 recipe) the winner's own term dominates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo.losses import FORMS
from sdpo.losses.terms import PairTerms

SDXL_SWITCH = 0.1
USES_REFERENCE_OUTPUT = True


def loss(terms: PairTerms, *, form: str = "sd15") -> Tensor:
    """Compute the form of the loss that `form` names, mean over pairs, ().

    Raises:
        ValueError: there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    # sigmoid(-u) is 1 - sigmoid(u) without the cancellation at large u.
    weight = torch.sigmoid(-terms.u)
    d = terms.pred_w - terms.ref_w
    per_pixel = weight.reshape(-1, *[1] * (d.ndim - 1))
    if form == "sd15":
        return (terms.residual_w - terms.beta * per_pixel * d).square().mean()
    # Both branches are evaluated and one is chosen on the device: no synchronisation.
    far = (per_pixel * d).square().mean()
    near = weight.square().mean()
    return torch.where(d.detach().square().mean() >= SDXL_SWITCH, far, near)

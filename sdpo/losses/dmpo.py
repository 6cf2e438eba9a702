"""DMPO, the reverse KL form: Li et al., "Divergence Minimization Preference Optimization for
Diffusion Model Alignment", arXiv 2507.07510.

    loss = mean over pairs of  KL( Bernoulli(p) || Bernoulli(q) ),   p = sigmoid(u),  q = 1 - alpha
         = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))

with log p = -softplus(-u), log(1 - p) = -softplus(u) and q clamped to [1e-6, 1 - 1e-6].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo.losses.terms import PairTerms

Q_MARGIN = 1e-6


def loss(terms: PairTerms, *, alpha: float = 0.0) -> Tensor:
    """Compute KL(p || q), mean over pairs, (); `alpha` smooths the target distribution."""
    u = terms.u
    q = min(max(1.0 - alpha, Q_MARGIN), 1.0 - Q_MARGIN)
    log_p, log_not_p = -F.softplus(-u), -F.softplus(u)
    won = torch.sigmoid(u) * (log_p - math.log(q))
    lost = torch.sigmoid(-u) * (log_not_p - math.log1p(-q))
    return (won + lost).mean()

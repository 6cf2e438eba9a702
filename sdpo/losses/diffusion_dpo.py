"""Diffusion-DPO: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization",
CVPR 2024, arXiv 2311.12908, eq. 14.

    loss = mean over pairs of  -log sigmoid(u),    u = -beta/2 * ((L_w - L_l) - (Lref_w - Lref_l))
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdpo.losses.terms import PairTerms


def loss(terms: PairTerms) -> Tensor:
    """Compute -log sigmoid(u), mean over pairs, ()."""
    return -F.logsigmoid(terms.u).mean()

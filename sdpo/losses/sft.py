"""Supervised fine-tuning on the winners alone: the baseline without preferences.

loss = mean over pairs of  L_w
"""

from __future__ import annotations

from torch import Tensor

from sdpo.losses.terms import PairTerms

USES_LOSERS = False


def loss(terms: PairTerms) -> Tensor:
    """Compute the mean of r_w^2 over pixels and pairs, ()."""
    return terms.error_w.mean()

"""The safeguard's scale where noise, image, v and velocity are predicted: scope pair is the same in
all of them, scope batch is not. docs/METHOD.md, "Other targets"."""

from __future__ import annotations

import pytest
import torch

from sdpo.losses.safeguard import loser_scale

PAIRS = 6


def residuals():
    """Residuals of a velocity of winners and losers that lie near each other, float64."""
    generator = torch.Generator().manual_seed(0)
    winner = torch.randn(PAIRS, 4, 5, 5, generator=generator, dtype=torch.float64)
    other = torch.randn(PAIRS, 4, 5, 5, generator=generator, dtype=torch.float64)
    return winner, winner + 0.7 * other


def factors():
    """Residual of each parametrisation over that of the model's own, (PAIRS, 1, 1, 1)."""
    sigma = torch.linspace(0.05, 0.95, PAIRS, dtype=torch.float64)[:, None, None, None]
    a = torch.linspace(0.99, 0.1, PAIRS, dtype=torch.float64)[:, None, None, None]
    s = (1 - a**2).sqrt()
    return {"flow-eps": 1 - sigma, "flow-x0": -sigma, "ddpm-eps": a, "ddpm-x0": -s}


@pytest.mark.parametrize("name", factors())
def test_residuals_transform_by_a_factor_of_time(name):
    """Written out: what a prediction of the velocity says of noise and image."""
    sigma = torch.linspace(0.05, 0.95, PAIRS, dtype=torch.float64)[:, None, None, None]
    a = torch.linspace(0.99, 0.1, PAIRS, dtype=torch.float64)[:, None, None, None]
    s = (1 - a**2).sqrt()
    generator = torch.Generator().manual_seed(1)
    clean, noise, wrong = torch.randn(3, PAIRS, 4, 5, 5, generator=generator, dtype=torch.float64)
    if name.startswith("flow"):
        x_t, target = (1 - sigma) * clean + sigma * noise, noise - clean
        said = {"flow-eps": x_t + (1 - sigma) * (target + wrong) - noise,
                "flow-x0": x_t - sigma * (target + wrong) - clean}  # fmt: skip
    else:
        x_t, target = a * clean + s * noise, a * noise - s * clean
        said = {"ddpm-eps": s * x_t + a * (target + wrong) - noise,
                "ddpm-x0": a * x_t - s * (target + wrong) - clean}  # fmt: skip
    torch.testing.assert_close(said[name], factors()[name] * wrong)


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", factors())
def test_scope_pair_is_the_same_in_every_parametrisation(name, mu):
    winner, loser = residuals()
    factor = factors()[name]
    torch.testing.assert_close(
        loser_scale(factor * winner, factor * loser, mu, "pair"),
        loser_scale(winner, loser, mu, "pair"),
    )


@pytest.mark.parametrize("name", factors())
def test_scope_batch_is_not(name):
    winner, loser = residuals()
    winner = winner * torch.linspace(0.5, 2, PAIRS, dtype=torch.float64)[:, None, None, None]
    factor = factors()[name]
    own, other = (
        loser_scale(f * winner, f * loser, 0.9, "batch") for f in (torch.ones_like(factor), factor)
    )
    assert (own - other).abs() > 1e-3
    # It is the weighted quotient, the weights those of the loss.
    weights = factor.flatten() ** 2
    squares, inner = (winner**2).sum((1, 2, 3)), (winner * loser).sum((1, 2, 3))
    by_hand = 0.1 * (weights * squares).sum() / (weights * inner).sum()
    torch.testing.assert_close(other, by_hand.clamp(0, 1))

"""DMPO's own properties; its values are checked in test_preference_loss.py."""

from __future__ import annotations

import math

import loss_reference as reference
import pytest
import torch

from sdpo import preference_loss


def with_logit(u: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pair whose u is given at beta 2: only the loser's error differs from the reference's."""
    target = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    ref = torch.tensor([1.0, 20.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    pred = torch.tensor([1.0, math.sqrt(400 + u)], dtype=torch.float64).reshape(2, 1, 1, 1)
    return pred, ref, target


def loss(u: float, alpha: float) -> float:
    return preference_loss("dmpo", *with_logit(u), beta=2.0, alpha=alpha).loss.item()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_zero_exactly_where_p_is_q_and_positive_elsewhere(alpha):
    q = 1 - alpha
    u = math.log(q / (1 - q))
    assert loss(u, alpha) == pytest.approx(0.0, abs=1e-12)
    for other in (u - 2, u - 0.1, u + 0.1, u + 2):
        assert loss(other, alpha) > 1e-5


def test_worked_example():
    # p = 3/4 against q = 1/2: 3/4 log(3/2) + 1/4 log(1/2).
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss(math.log(3), 0.5) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1.0, 1 - 1e-9])
def test_target_is_kept_a_millionth_from_certainty(alpha):
    for u in (-5.0, 0.0, 5.0):
        clamped = 1e-6 if alpha < 0.5 else 1 - 1e-6
        assert loss(u, alpha) == pytest.approx(loss(u, clamped), rel=1e-9)
        assert math.isfinite(loss(u, alpha))


def test_the_far_ends_are_the_logs_of_q():
    # p = 1: -log q; p = 0: -log(1 - q).
    assert loss(300.0, 0.01) == pytest.approx(-math.log(0.99), rel=1e-9)
    assert loss(-300.0, 0.01) == pytest.approx(-math.log(0.01), rel=1e-9)


def test_gradient_pulls_u_towards_q():
    for u, sign in ((0.0, -1), (8.0, 1)):
        pred, ref, target = with_logit(u)
        leaf = pred.requires_grad_()
        preference_loss("dmpo", leaf, ref, target, beta=2.0, alpha=0.1).loss.backward()
        # d loss / d u has the sign of u - log(q / (1 - q)); u rises with the loser's error.
        assert math.copysign(1, leaf.grad[1].item()) == sign
    assert reference.sigmoid(0.0) < 0.9 < reference.sigmoid(8.0)

"""What docs/METHOD.md says is guaranteed, and the smallest cases in which it is not.

A step of the outputs themselves is taken throughout: prediction <- prediction - h * gradient. Its
first-order effect on the winners is -h <r_w, gradient at the winners' outputs> and what of the
losers' gradient reaches the winners through shared parameters, for which the identity stands here:
winner and loser of a pair move the same output, as under equal Jacobians.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo import loser_scale, preference_loss

WEIGHTED = ("diffusion-dpo", "dmpo")


def pair(winner_sq: float, inner: float) -> tuple[list[float], list[float]]:
    """Residuals of two numbers with |r_w|^2 and <r_w, r_l> as given."""
    return [winner_sq**0.5, 0.0], [inner / winner_sq**0.5, 0.3]


def change_of_winners(r_w, r_l, weights, scale):
    """First-order change of the sum of winners' errors per unit of step, under -(w r_w - w lam r_l)
    for each pair."""
    step = weights[:, None] * (r_w - scale.reshape(-1, 1) * r_l)
    return -(r_w * step).sum()


def test_batch_scope_does_not_hold_under_unequal_weights():
    """Two pairs whose conflicts cancel in the sum: the scale is 1, and the pair with the larger
    weight pushes the winners up."""
    rows = [pair(1.0, 2.0), pair(1.0, -2.0)]
    r_w, r_l = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (0, 1))
    scale = loser_scale(r_w, r_l, 0.9, "batch")
    assert scale == 1.0
    assert change_of_winners(r_w, r_l, torch.ones(2).double(), scale) <= 0
    assert change_of_winners(r_w, r_l, torch.tensor([1.0, 0.01]).double(), scale) > 0.9


@given(
    seed=st.integers(0, 10_000),
    mu=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    conflict=st.floats(-3, 3),
)
@settings(max_examples=60, deadline=None)
def test_pair_scope_holds_under_any_weights(seed, mu, conflict):
    g = torch.Generator().manual_seed(seed)
    r_w, noise = torch.randn(2, 4, 10, generator=g, dtype=torch.float64)
    r_l = conflict * r_w + noise
    weights = torch.rand(4, generator=g, dtype=torch.float64) ** 4
    scale = loser_scale(r_w, r_l, mu, "pair")
    allowed = -mu * (weights * r_w.square().sum(1)).sum()
    assert change_of_winners(r_w, r_l, weights, scale) <= allowed + 1e-9


@pytest.mark.parametrize("method", WEIGHTED)
def test_both_branches_of_a_pair_carry_one_weight(method):
    """The premise of scope "pair": c_w = w_i r_w, c_l = -w_i r_l with one w_i > 0 a pair."""
    g = torch.Generator().manual_seed(0)
    pred, ref, target = torch.randn(3, 6, 4, 2, 2, generator=g, dtype=torch.float64)
    pred.requires_grad_()
    loss = preference_loss(method, pred, ref, target, beta=2.0, alpha=0.01).loss
    (gradient,) = torch.autograd.grad(loss, pred)
    residual = (pred - target).detach()
    weights = (gradient / residual).flatten(1)
    assert (weights.amax(1) - weights.amin(1)).abs().max() < 1e-9
    assert torch.allclose(weights[:3], -weights[3:])
    assert weights[:, 0].abs().max() / weights[:, 0].abs().min() > 2


def test_below_its_switch_dspos_sdxl_form_is_a_loss_of_the_margin_alone():
    """mean of (1 - sigmoid(u))^2: both branches carry the weight beta sigmoid(-u)^2 sigmoid(u) / B,
    as under Diffusion-DPO at the start but for a factor 2, and less the worse a pair is ranked."""
    g = torch.Generator().manual_seed(0)
    pred, noise, target = torch.randn(3, 6, 4, 2, 2, generator=g, dtype=torch.float64)
    ref = pred + 0.1 * noise
    pred.requires_grad_()
    found = preference_loss("dspo", pred, ref, target, beta=20.0, form="sdxl")
    (gradient,) = torch.autograd.grad(found.loss, pred)
    residual = (pred - target).detach()
    error, ref_error = (x.square().flatten(1).mean(1) for x in (residual, ref - target))
    drift = error - ref_error
    u = -20.0 / 2 * (drift[:3] - drift[3:])
    weights = 20.0 * torch.sigmoid(-u) ** 2 * torch.sigmoid(u) / 3
    expected = torch.cat([weights, -weights]).reshape(-1, 1, 1, 1) * 2 * residual / 16
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=0)
    assert weights.max() / weights.min() > 1.2


@pytest.mark.parametrize("beta", [0.001, 1.0, 3.0, 5000.0])
def test_dspos_sd15_form_starts_with_a_multiple_of_the_winners_own_gradient(beta):
    """At d = 0 no gradient reaches the losers, and the winners' is (1 - beta / 2) times that of
    their own error: beyond beta = 2 a step raises it."""
    g = torch.Generator().manual_seed(4)
    pred, target = torch.randn(2, 6, 4, 2, 2, generator=g, dtype=torch.float64)
    pred.requires_grad_()
    loss = preference_loss("dspo", pred, pred.detach(), target, beta=beta, form="sd15").loss
    (gradient,) = torch.autograd.grad(loss, pred)
    (own,) = torch.autograd.grad((pred - target)[:3].square().mean(), pred)
    assert torch.allclose(gradient, (1 - beta / 2) * own, rtol=1e-9, atol=0)
    assert own[:3].abs().max() > 0


def test_equal_isometric_jacobians_leave_the_scale_as_it_is():
    g = torch.Generator().manual_seed(1)
    r_w, noise = torch.randn(2, 6, generator=g, dtype=torch.float64)
    r_l = 1.5 * r_w + noise
    q, _ = torch.linalg.qr(torch.randn(20, 6, generator=g, dtype=torch.float64))
    at_output = loser_scale(r_w, r_l, 0.5)
    assert 0 < at_output < 1
    assert loser_scale(3.0 * q @ r_w, 3.0 * q @ r_l, 0.5) == pytest.approx(at_output.item())
    # Neither half is idle: another map of the losers, or a map that is no isometry, changes it.
    other, _ = torch.linalg.qr(torch.randn(20, 6, generator=g, dtype=torch.float64))
    assert abs(loser_scale(q @ r_w, other @ r_l, 0.5) - at_output) > 0.05
    stretched = q * torch.linspace(0.2, 3.0, 6, dtype=torch.float64)
    assert abs(loser_scale(stretched @ r_w, stretched @ r_l, 0.5) - at_output) > 0.05


def test_a_diagonal_preconditioner_can_undo_it():
    """g_w = (1, 1), g_l = (-3, 4): at mu = 0.5 the safeguarded descent direction lowers the
    winners' error; multiplied by Adam's kind of diagonal, it raises it."""
    g_w, g_l = torch.tensor([1.0, 1.0]).double(), torch.tensor([-3.0, 4.0]).double()
    scale = loser_scale(g_w, g_l, 0.5)
    direction = g_w - scale * g_l
    assert g_w @ direction == pytest.approx(0.5 * (g_w @ g_w))
    diagonal = torch.tensor([0.1, 1.0]).double()
    assert g_w @ (diagonal * direction) < -1.0


def test_a_long_step_can_undo_it():
    """The winner's error is quadratic along the step: beyond twice its minimum it has risen."""
    r_w, r_l = (torch.tensor(x).double() for x in ([1.0, 0.0], [1.0, 4.0]))
    direction = r_w - loser_scale(r_w, r_l, 0.5) * r_l

    def error(h):
        return (r_w - h * direction).square().sum()

    turning = (r_w @ direction / direction.square().sum()).item()
    assert error(turning) < error(0.0)
    assert error(2.01 * turning) > error(0.0)


@pytest.mark.parametrize(("form", "beta"), [("sd15", 0.9), ("sdxl", 0.5)])
def test_dspos_own_winner_term_can_raise_the_winner(form, beta):
    """With no gradient through the loser at all (mu = 1 and a conflict), DSPO still pulls the
    winner's prediction towards the reference's; where that is worse, the winner gets worse."""
    target = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    pred = torch.tensor([[0.1, 0.0], [1.0, 0.0]]).double().reshape(2, 1, 1, 2).requires_grad_()
    far = {"sd15": -2.0, "sdxl": 2.0}[form]
    ref = torch.tensor([[far, 0.0], [1.0, 0.0]]).double().reshape(2, 1, 1, 2)
    out = preference_loss("dspo", pred, ref, target, beta=beta, mu=1.0, scope="pair", form=form)
    (gradient,) = torch.autograd.grad(out.loss, pred)
    assert gradient[1].abs().max() == 0
    assert out.metrics["loser_scale"] == 0
    r_w = (pred - target).detach()[0]
    assert -(r_w * gradient[0]).sum() > 0


def test_at_the_recipes_beta_dspo_is_the_winners_own_error():
    """beta = 0.001: the winner's term is its error to a thousandth, the losers' share of the
    gradient is as small, and so is what the safeguard can change."""
    g = torch.Generator().manual_seed(3)
    target = torch.randn(8, 4, 8, 8, generator=g, dtype=torch.float64)
    pred = (target + 0.2 * torch.randn(target.shape, generator=g).double()).requires_grad_()
    ref = (pred + 0.05 * torch.randn(target.shape, generator=g).double()).detach()
    loss = preference_loss("dspo", pred, ref, target, beta=0.001).loss
    (gradient,) = torch.autograd.grad(loss, pred)
    assert gradient[4:].norm() < 1e-3 * gradient[:4].norm()
    error = (pred - target)[:4].square().mean()
    (own,) = torch.autograd.grad(error, pred)
    assert (gradient[:4] - own[:4]).norm() < 2e-3 * own[:4].norm()

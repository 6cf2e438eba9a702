"""sdpo/losses/safeguard.py against its formula, in numpy and by what the scale must achieve."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo import loser_scale, scale_from_products, scale_gradient

MUS = (0.0, 0.2, 0.6, 0.9, 1.0)


def expected_scale(win: np.ndarray, lose: np.ndarray, mu: float, scope: str) -> np.ndarray:
    """The formula pair by pair, with float64 dot products of flat vectors."""
    win = np.asarray(win, np.float64).reshape(len(win), -1)
    lose = np.asarray(lose, np.float64).reshape(len(lose), -1)
    if scope == "batch":
        win, lose = win.reshape(1, -1), lose.reshape(1, -1)
    scales = []
    for a, b in zip(win, lose, strict=True):
        dot = float(np.dot(a, b))
        scales.append(1.0 if dot <= 0 else min(1.0, (1.0 - mu) * float(np.dot(a, a)) / dot))
    return np.array(scales if scope == "pair" else scales[0])


def residuals(shape, seed=0, correlation=0.8, loser_size=3.0, dtype=torch.float64):
    """Winner and loser residuals that conflict, the loser's the larger."""
    g = torch.Generator().manual_seed(seed)
    win = torch.randn(shape, generator=g, dtype=torch.float64)
    other = torch.randn(shape, generator=g, dtype=torch.float64)
    mixed = correlation * win + (1 - correlation**2) ** 0.5 * other
    return win.to(dtype), (loser_size * mixed).to(dtype)


@pytest.mark.parametrize("scope", ["batch", "pair"])
@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 1e-5),
        (torch.float16, 1e-5),
    ],
)
def test_formula(scope, mu, dtype, rtol):
    # Half inputs too are accumulated in float32: only their own rounding separates them from exact.
    for correlation in (-0.5, 0.05, 0.8, 1.0):
        win, lose = residuals((5, 4, 8, 8), correlation=correlation, dtype=dtype)
        scale = loser_scale(win, lose, mu, scope)
        want = expected_scale(win.double().numpy(), lose.double().numpy(), mu, scope)
        np.testing.assert_allclose(scale.double().numpy(), want, rtol=rtol, atol=1e-12)
        assert scale.shape == ((5,) if scope == "pair" else ())
        assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((scale >= 0) & (scale <= 1)).all()


def test_some_scales_lie_strictly_between_and_some_at_the_ends():
    win, lose = residuals((6, 16))
    inner = loser_scale(win, lose, 0.5, "pair")
    assert ((inner > 0) & (inner < 1)).all()
    assert (loser_scale(win, lose, 1.0, "pair") == 0).all()
    assert (loser_scale(win, 0.1 * lose, 0.5, "pair") == 1).all()


def test_default_scope_is_the_batch():
    win, lose = residuals((3, 8))
    assert torch.equal(loser_scale(win, lose, 0.5), loser_scale(win, lose, 0.5, "batch"))


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_scale_carries_no_gradient(scope):
    win, lose = residuals((3, 8))
    scale = loser_scale(win.requires_grad_(), lose.requires_grad_(), 0.5, scope)
    assert not scale.requires_grad
    assert scale.grad_fn is None


@pytest.mark.parametrize("scope", ["batch", "pair"])
@pytest.mark.parametrize("mu", MUS)
def test_special_residuals(scope, mu):
    win = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros_like(win)
    left, right = win.clone(), win.clone()
    left[..., :2], right[..., 2:] = 0, 0  # no pixel in common: orthogonal

    def scale_of(a, b):
        return loser_scale(a, b, mu, scope)

    ones = torch.ones_like(scale_of(win, win))
    torch.testing.assert_close(scale_of(win, win), (1 - mu) * ones)
    torch.testing.assert_close(scale_of(win, 4 * win), (1 - mu) / 4 * ones)
    assert torch.equal(scale_of(win, -win), ones)
    assert torch.equal(scale_of(left, right), ones)
    assert torch.equal(scale_of(zero, win), ones)
    assert torch.equal(scale_of(win, zero), ones)
    assert torch.equal(scale_of(zero, zero), ones)


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_does_not_depend_on_the_residuals_magnitude(scope):
    # In float32 the squares stay normal numbers for residuals of about 1e-17 to 1e17. Below, they
    # vanish and nothing is scaled; above, the squared errors themselves are infinite.
    win, lose = residuals((3, 4, 8, 8), dtype=torch.float32)
    at_one = loser_scale(win, lose, 0.7, scope)
    assert 0 < float(at_one.min()) <= float(at_one.max()) < 1
    for exponent in range(-17, 18):
        size = 10.0**exponent
        torch.testing.assert_close(loser_scale(win * size, lose * size, 0.7, scope), at_one)
    assert (loser_scale(win * 1e-30, lose * 1e-30, 0.7, scope) == 1).all()
    assert (win * 1e25).square().sum().isinf()
    wide = loser_scale(win.double() * 1e-100, lose.double() * 1e-100, 0.7, scope)
    torch.testing.assert_close(wide.float(), at_one)


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_does_not_depend_on_the_tensors_size(scope):
    win, lose = residuals((2, 64), loser_size=1e-3 * 3, dtype=torch.float32)
    win = 1e-3 * win
    small = loser_scale(win, lose, 0.9, scope)
    large = loser_scale(win.repeat(1, 2**15), lose.repeat(1, 2**15), 0.9, scope)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=0)


def test_pair_scope_is_the_batch_scope_of_each_pair():
    win, lose = residuals((6, 3, 4, 4), dtype=torch.float32)
    lose[::2] *= 0.01
    together = loser_scale(win, lose, 0.6, "pair")
    apart = [loser_scale(win[i : i + 1], lose[i : i + 1], 0.6, "batch") for i in range(6)]
    torch.testing.assert_close(together, torch.stack(apart))
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize("mu", [-0.01, 1.01, float("nan"), float("inf"), -float("inf")])
def test_mu_outside_its_range_is_refused(mu):
    win, lose = residuals((2, 4))
    with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\]"):
        loser_scale(win, lose, mu)


def test_from_products_what_is_not_a_number_stays_so():
    """Overflowed gradients must not pass for branches without a conflict."""
    nan, inf = float("nan"), float("inf")
    winner_sq = torch.tensor([2.0, 2.0, 2.0, nan, inf, 2.0])
    inner = torch.tensor([4.0, -4.0, 0.0, 1.0, inf, nan])
    scale = scale_from_products(winner_sq, inner, 0.5)
    assert scale[:3].tolist() == [0.25, 1.0, 1.0]
    assert scale[3:].isnan().all()
    with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\]"):
        scale_from_products(winner_sq, inner, 1.5)


def test_unknown_scope_and_unequal_shapes_are_refused():
    win, lose = residuals((2, 4))
    with pytest.raises(ValueError, match=r"scope .* 'global'"):
        loser_scale(win, lose, 0.5, "global")
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 3\)"):
        loser_scale(win, lose[:, :3], 0.5)


def _first_order(win, lose, scale, scope):
    """<g_w, -g_w + scale g_l> and |g_w|^2 in float64, per pair or over all."""
    win, lose = win.double().flatten(1), lose.double().flatten(1)
    if scope == "batch":
        win, lose = win.reshape(1, -1), lose.reshape(1, -1)
    step = -win + scale.double().reshape(-1, 1) * lose
    return (win * step).sum(1), (win * win).sum(1), (win.abs() * (win.abs() + lose.abs())).sum(1)


numbers = st.one_of(
    st.floats(-1e3, 1e3),
    st.sampled_from([0.0, 1.0, -1.0, 1e-6, -1e-6, 1e6, -1e6]),
)


@st.composite
def two_residuals(draw):
    pairs, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    values = draw(st.lists(numbers, min_size=2 * pairs * size, max_size=2 * pairs * size))
    win, lose = torch.tensor(values, dtype=torch.float64).reshape(2, pairs, size)
    kind = draw(st.sampled_from(["free", "nearly parallel", "nearly orthogonal", "much larger"]))
    if kind == "nearly parallel":
        lose = win * draw(st.floats(0.5, 100)) + 1e-9 * lose
    elif kind == "nearly orthogonal":
        lose = lose - win * (win * lose).sum() / (win * win).sum().clamp_min(1e-12) + 1e-9 * win
    elif kind == "much larger":
        lose = 1e8 * lose
    return win, lose


@settings(max_examples=300, deadline=None)
@given(two_residuals(), st.floats(0, 1), st.sampled_from(["batch", "pair"]))
def test_winner_keeps_its_share_and_the_scale_is_the_largest_that_does(both, mu, scope):
    win, lose = both
    scale = loser_scale(win, lose, mu, scope)
    assert ((scale >= 0) & (scale <= 1)).all()
    change, winner_sq, size = _first_order(win, lose, scale, scope)
    rounding = 1e-12 * size
    assert (change <= -mu * winner_sq + rounding).all()
    more = scale.reshape(-1) * 1.01 + 1e-6
    change, _, _ = _first_order(win, lose, more, scope)
    # What is not yet at 1 cannot be raised: the excess is that of the raise, up to rounding.
    flat_w, flat_l = (win, lose) if scope == "pair" else (win.reshape(1, -1), lose.reshape(1, -1))
    raised, inner = more - scale.reshape(-1), (flat_w * flat_l).sum(1)
    gain = raised * inner
    limited = scale.reshape(-1) < 1
    assert (change[limited] >= (-mu * winner_sq + gain - 2 * rounding)[limited]).all()
    # Of the factors: the product of two small numbers can vanish.
    assert (raised[limited] > 0).all()
    assert (inner[limited] > 0).all()


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_a_step_along_the_scaled_direction_does_not_raise_the_winners_error(scope):
    win, lose = residuals((4, 3, 6, 6), loser_size=5.0)
    step = 1e-4
    for mu in MUS:
        scale = loser_scale(win, lose, mu, scope).reshape(-1, *[1] * 3)
        before = win.square().sum((1, 2, 3)) if scope == "pair" else win.square().sum()
        moved = (win + step * (-win + scale * lose)).square()
        after = moved.sum((1, 2, 3)) if scope == "pair" else moved.sum()
        slack = step**2 * (win.square().sum() + lose.square().sum())
        assert (after <= before - 2 * step * mu * before + slack).all()
    raised = (win + step * (-win + lose)).square().sum()
    assert raised > win.square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,)])
def test_scale_gradient_changes_the_gradient_alone(dtype, shape):
    g = torch.Generator().manual_seed(3)
    value = (torch.randn(7, generator=g, dtype=torch.float64) * 1e3).to(dtype).requires_grad_()
    scale = torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(7, generator=g, dtype=torch.float64).to(dtype)
    scaled = scale_gradient(value, scale)
    assert torch.equal(scaled, value)
    assert scaled.dtype == dtype
    scaled.backward(weight)
    assert torch.equal(value.grad, scale * weight)

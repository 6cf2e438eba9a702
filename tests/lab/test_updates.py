"""Displacements against the optimizer itself, changes against finite differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.config import OptimConfig
from sdpo.lab.audit.gradients import Network
from sdpo.lab.audit.updates import Moments, WinnerErrors, clipped, displacements
from sdpo.models.sd15 import SD15

OPTIM = OptimConfig(
    adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-3, adam_weight_decay=0.1, max_grad_norm=1.0
)
LR = 1e-2


@pytest.fixture
def small():
    """Two parameters with an AdamW that has made three steps."""
    g = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in ((3, 2), (4,))
    ]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)

    def gradient():
        return [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]

    for _ in range(3):
        step(optimizer, parameters, clipped(gradient(), 1.0))
    return parameters, optimizer, gradient()


def step(optimizer, parameters, gradient):
    for p, x in zip(parameters, gradient, strict=True):
        p.grad = x.clone()
    optimizer.step()


def read(optimizer, parameters):
    moments = Moments.read({"optimizer": optimizer.state_dict()}, parameters, Path("c"))
    # Read as float32, which a run has; the comparison here wants more.
    states = [optimizer.state[p] for p in parameters]
    moments.first = [s["exp_avg"].clone() for s in states]
    moments.second = [s["exp_avg_sq"].clone() for s in states]
    return moments


def test_adam_is_the_optimizers_own_step(small):
    parameters, optimizer, gradient = small
    found = displacements(gradient, parameters, read(optimizer, parameters), OPTIM, LR)
    before = [p.detach().clone() for p in parameters]
    for p, x in zip(parameters, gradient, strict=True):
        p.grad = x.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for p, b, d in zip(parameters, before, found["adam"], strict=True):
        torch.testing.assert_close(p.detach() - b, d, rtol=1e-9, atol=1e-14)


def test_preconditioned_is_adam_without_momentum_and_decay(small):
    parameters, optimizer, gradient = small
    moments = read(optimizer, parameters)
    found = displacements(gradient, parameters, moments, OPTIM, LR)
    g = clipped(gradient, 1.0)
    for x, v, d in zip(g, moments.second, found["preconditioned"], strict=True):
        second = (0.99 * v + 0.01 * x * x) / (1 - 0.99**4)
        torch.testing.assert_close(d, -LR * x / (second.sqrt() + 1e-3))
    for x, d in zip(g, found["gradient"], strict=True):
        torch.testing.assert_close(d, -LR * x)


def test_a_short_gradient_is_not_clipped():
    gradient = [torch.full((2,), 0.1), torch.full((1,), 0.2)]
    for x, y in zip(clipped(gradient, 1.0), gradient, strict=True):
        assert torch.equal(x, y)


def test_foreign_optimizer_state_is_refused(small):
    parameters, optimizer, _ = small
    for training in ({}, {"optimizer": {"state": {0: {"step": 1.0}}}}):
        with pytest.raises(UserError, match=r"--checkpoint: c holds no AdamW state"):
            Moments.read(training, parameters, Path("c"))
    with pytest.raises(UserError, match="AdamW"):
        Moments.read({"optimizer": optimizer.state_dict()}, parameters[::-1], Path("c"))
    assert Moments.read({"optimizer": optimizer.state_dict()}, parameters, Path("c")).steps == 3


@pytest.fixture(scope="module")
def errors(double_unet, pairs):
    return WinnerErrors(Network(SD15(), double_unet), pairs)


def some_direction(double_unet):
    g = torch.Generator().manual_seed(3)
    return [
        torch.randn(p.shape, generator=g, dtype=torch.float64) * p.detach().abs().mean()
        for p in double_unet.parameters()
    ]


def test_errors_are_the_winners(errors, double_unet, pairs):
    with torch.no_grad():
        expected = (
            (Network(SD15(), double_unet).predict(pairs) - pairs.target)
            .square()
            .flatten(1)
            .mean(1)[:3]
        )
    torch.testing.assert_close(errors.before, expected, rtol=1e-9, atol=0)


def test_first_order_change_against_central_differences(errors, double_unet):
    direction = some_direction(double_unet)
    h = 1e-5
    there = errors.realised([h * d for d in direction])
    back = errors.realised([-h * d for d in direction])
    expected = (there - back) / (2 * h)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(errors.first_order(direction), expected, rtol=1e-5, atol=0)


def test_realised_change_leaves_the_weights_alone(errors, double_unet):
    before = {k: v.clone() for k, v in double_unet.state_dict().items()}
    assert errors.realised(some_direction(double_unet)).abs().min() > 0
    assert all(torch.equal(v, before[k]) for k, v in double_unet.state_dict().items())

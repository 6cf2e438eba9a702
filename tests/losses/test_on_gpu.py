"""Losses, gradients and scales on an accelerator against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from loss_reference import tensors

from sdpo import loser_scale, preference_loss

pytestmark = pytest.mark.gpu
BETA = {"diffusion-dpo": 50.0, "dmpo": 50.0, "dspo": 0.5, "sft": 1.0}
OPTIONS = {"dmpo": {"alpha": 0.1}, "dspo": {"form": "sd15"}}
# A few units of the format's rounding: what is given is rounded to it, and the sums are float32.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def loss_and_gradient(method, given, mu, scope):
    prediction, reference, target = given
    leaf = prediction.clone().requires_grad_()
    options = OPTIONS.get(method, {})
    found = preference_loss(
        method, leaf, reference, target, beta=BETA[method], mu=mu, scope=scope, **options
    )
    found.loss.backward()
    return found.loss.detach(), leaf.grad, found.scale


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("scope", ["batch", "pair"])
@pytest.mark.parametrize("method", BETA)
def test_losses(device, method, scope, dtype):
    given = tensors(pairs=4, shape=(4, 16, 16))
    mu = None if method == "sft" else 0.6
    wanted = loss_and_gradient(method, given, mu, scope)
    found = loss_and_gradient(method, [x.to(device, dtype) for x in given], mu, scope)
    for value, true in zip(found, wanted, strict=True):
        assert value.device.type == device.type
        apart = (value.double().cpu() - true).abs().max()
        assert apart <= BOUND[dtype] * true.abs().max(), (apart, true.abs().max())


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_scales(device, scope):
    prediction, _, target = tensors(pairs=8, shape=(4, 32, 32))
    winner, loser = (prediction - target).chunk(2)
    wanted = loser_scale(winner, loser, 0.9, scope)
    found = loser_scale(winner.to(device).float(), loser.to(device).float(), 0.9, scope)
    torch.testing.assert_close(found.cpu().double(), wanted.double(), rtol=1e-5, atol=1e-6)

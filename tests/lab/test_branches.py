"""The two branches' gradients against autograd through the whole loss."""

from __future__ import annotations

import pytest
import torch

from sdpo import preference_loss
from sdpo.config import MethodConfig
from sdpo.lab.audit.gradients import Network, branches, inner, modes
from sdpo.losses.safeguard import loser_scale
from sdpo.models.sd15 import SD15

METHODS = {"diffusion-dpo": 3.0, "dspo": 0.5, "dmpo": 3.0}
MU = 0.6


@pytest.fixture(scope="module", params=sorted(METHODS))
def case(request, double_unet, pairs):
    """(method, parameters, prediction, reference, branches) of one method."""
    method = MethodConfig(request.param, METHODS[request.param], dmpo_alpha=0.01)
    network = Network(SD15(), double_unet)
    parameters = list(double_unet.parameters())
    prediction = network.predict(pairs)
    g = torch.Generator().manual_seed(2)
    off = torch.randn(prediction.shape, generator=g, dtype=torch.float64)
    reference = (prediction + 0.3 * off).detach()
    found = branches(network, pairs, reference, method, MU)
    return method, parameters, prediction, reference, found


def whole(case, pairs, **safeguard):
    """The gradient of the loss that train.py would take."""
    method, parameters, prediction, reference, _ = case
    loss = preference_loss(
        method.train_method,
        prediction,
        reference,
        pairs.target,
        beta=method.beta_dpo,
        **method.options("sd15"),
        **safeguard,
    ).loss
    return torch.autograd.grad(loss, parameters, retain_graph=True)


def check_same(found, expected):
    size = max(e.abs().max() for e in expected)
    for x, e in zip(found, expected, strict=True):
        assert (x - e).abs().max() < 1e-9 * size


@pytest.mark.parametrize(
    ("mode", "safeguard"),
    [
        ("none", {}),
        ("batch", {"mu": MU, "scope": "batch"}),
        ("pair", {"mu": MU, "scope": "pair"}),
    ],
)
def test_modes_are_what_training_does(case, pairs, mode, safeguard):
    treated = modes(case[4], MU, [])[mode]
    check_same(treated.gradient, whole(case, pairs, **safeguard))


def test_fixed_scales_lie_on_the_line_between_the_ends(case, pairs):
    found = modes(case[4], MU, [0.0, 0.25])
    none, zero = whole(case, pairs), found["fixed 0"].gradient
    between = [0.25 * n + 0.75 * z for n, z in zip(none, zero, strict=True)]
    check_same(found["fixed 0.25"].gradient, between)
    assert found["fixed 0.25"].scale == 0.25


def test_errors_gradients_against_autograd(case, pairs):
    _, parameters, prediction, _, found = case
    errors = (prediction - pairs.target).square().flatten(1).mean(1).chunk(2)
    for error, gradient in zip(errors, (found.winner_error, found.loser_error), strict=True):
        check_same(gradient, torch.autograd.grad(error.mean(), parameters, retain_graph=True))


def test_parameter_scale_is_that_of_the_flattened_gradients(case):
    found = case[4]
    flat = [torch.cat([g.flatten() for g in x]) for x in (found.winner_error, found.loser_error)]
    expected = loser_scale(*flat, MU)
    assert 0 < expected < 1
    assert modes(found, MU, [])["parameter"].scale == pytest.approx(expected.item(), rel=1e-9)


def test_weighted_scale_leaves_the_share_that_mu_asks_for(case):
    found = case[4]
    treated = modes(found, MU, [])["weighted"]
    own = inner(found.winner_error, found.winner_part)
    left = inner(found.winner_error, treated.gradient)
    if 0 < treated.scale < 1:
        assert left == pytest.approx(MU * own, rel=1e-9)
    else:
        assert treated.scale == 1.0
        assert left >= MU * own

"""The scale from gradients over the parameters, against flat gradients and finite differences."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdpo import loser_scale
from sdpo.config import ModelConfig
from sdpo.models.forward import NoisedPairs, predict
from sdpo.models.lora import add_adapters, seed_dropout
from sdpo.models.sd15 import SD15
from sdpo.training.parameter_safeguard import BranchGradients, gradient_scale, inner_product

KEYS = [(0, 0, 4), (0, 0, 5), (0, 0, 6)]
MU = 0.6


def alone(**more):
    """An accelerator of one process in the weights' own precision."""
    one = {"num_processes": 1, "scaler": None, "autocast": nullcontext}
    return SimpleNamespace(**{**one, "unwrap_model": lambda module: module, **more})


def flat_gradients(unet, inputs, keys=None, only=None):
    """(G_w, G_l) of the mean errors of all pairs, or of pair `only`, as vectors: one forward pass
    over all samples, as in the loss."""
    if keys:
        seed_dropout(keys)
    errors = (predict(SD15(), unet, inputs) - inputs.target).square().mean((1, 2, 3)).reshape(2, -1)
    found = []
    for branch in errors:
        value = branch.mean() if only is None else branch[only]
        trained = [p for p in unet.parameters() if p.requires_grad]
        grads = torch.autograd.grad(value, trained, retain_graph=True)
        found.append(torch.cat([g.flatten() for g in grads]))
    return found


def expected(winner, loser, mu=MU):
    dot = torch.dot(winner, loser).item()
    return 1.0 if dot <= 0 else min(1.0, (1 - mu) * torch.dot(winner, winner).item() / dot)


def step_scale(space, *parts):
    for inputs, keys in parts:
        space.add(inputs, keys)
    return space.step_scale()


def test_one_scale_of_a_step(double_unet, pairs):
    want = expected(*flat_gradients(double_unet, pairs))
    assert 0 < want < 1
    found = step_scale(BranchGradients(SD15(), alone(), double_unet, MU), (pairs, KEYS))
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(want, rel=1e-9)
    assert not found.requires_grad
    # It is another one than at the output.
    residual = (predict(SD15(), double_unet, pairs) - pairs.target).detach()
    assert abs(loser_scale(*residual.chunk(2), MU).item() - want) > 1e-3 * want


def test_one_scale_per_pair(double_unet, pairs):
    want = [expected(*flat_gradients(double_unet, pairs, only=i)) for i in range(3)]
    found = BranchGradients(SD15(), alone(), double_unet, MU).pair_scales(pairs, KEYS)
    assert found.tolist() == pytest.approx(want, rel=1e-9)
    assert max(want) - min(want) > 1e-3


def test_micro_batches_do_not_matter(double_unet, pairs):
    space = BranchGradients(SD15(), alone(), double_unet, MU)
    whole = step_scale(space, (pairs, KEYS))
    # Pair i and its loser are three samples apart.
    single = [(pairs.samples(slice(i, None, 3)), KEYS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(step_scale(space, *single), whole, rtol=1e-9, atol=0)
    # What was added is forgotten; and the sums are no mean of the parts' scales.
    apart = [step_scale(space, part) for part in single]
    assert abs(torch.stack(apart).mean() - whole) > 1e-3 * whole


def test_processes_do_not_matter(double_unet, pairs):
    """Two processes with half of the samples each see what one sees with all of them."""
    inputs = pairs.samples(slice(0, None, 3)), pairs.samples(slice(1, None, 3))
    want = step_scale(
        BranchGradients(SD15(), alone(), double_unet, MU),
        *zip(inputs, (KEYS[:1], KEYS[1:2]), strict=True),
    )
    # `reduce` of the other process's gradients, in the order in which they are asked for.
    others = flat_gradients(double_unet, inputs[1])
    sizes = [p.numel() for p in double_unet.parameters()]
    waiting = iter([g for branch in others for g in branch.split(sizes)])

    def reduce(gradient, how):
        assert how == "mean"
        return (gradient + next(waiting).reshape(gradient.shape)) / 2

    space = BranchGradients(SD15(), alone(num_processes=2, reduce=reduce), double_unet, MU)
    found = step_scale(space, (inputs[0], KEYS[:1]))
    assert next(waiting, None) is None
    torch.testing.assert_close(found, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scope", ["batch", "pair"])
@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_the_winners_error_falls_by_its_share(double_unet, pairs, scope, mu):
    """Its derivative along -(G_w - lam G_l), by central differences, is -mu |G_w|^2 where lam is
    between 0 and 1, and at most that where it is 1."""
    only = None if scope == "batch" else 1
    space = BranchGradients(SD15(), alone(), double_unet, mu)
    if scope == "batch":
        scale = step_scale(space, (pairs, KEYS))
    else:
        scale = space.pair_scales(pairs, KEYS)[only]
    winner, loser = flat_gradients(double_unet, pairs, only=only)
    direction = -(winner - scale * loser)
    moved = copy.deepcopy(double_unet)
    start = nn.utils.parameters_to_vector(double_unet.parameters()).detach()
    # Short against where the error bends.
    h = 1e-5 / direction.norm()

    def winners_error(along):
        nn.utils.vector_to_parameters(start + along * direction, moved.parameters())
        with torch.no_grad():
            errors = (predict(SD15(), moved, pairs) - pairs.target)[:3].square().mean((1, 2, 3))
        return errors.mean() if only is None else errors[only]

    slope = ((winners_error(h) - winners_error(-h)) / (2 * h)).item()
    limit = -mu * torch.dot(winner, winner).item()
    assert slope <= limit * (1 - 1e-5)
    if scale < 1:
        assert slope == pytest.approx(limit, rel=1e-5)
    assert mu < 0.9 or scale < 1


class Rotated(nn.Module):
    """Prediction = input + Q theta_t: an orthonormal Jacobian, and parameters for each timestep."""

    def __init__(self, count, size):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.theta = nn.Parameter(torch.randn(count, size, generator=g, dtype=torch.float64))
        square = torch.randn(size, size, generator=g, dtype=torch.float64)
        self.rotation = torch.linalg.qr(square)[0]

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict):
        shift = self.theta[timesteps] @ self.rotation.T
        return (noisy + shift.reshape(noisy.shape),)


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_an_orthonormal_jacobian_gives_the_scale_at_the_output(scope):
    g = torch.Generator().manual_seed(3)
    target = torch.randn(3, 2, 2, 2, generator=g, dtype=torch.float64)
    target = target.repeat(2, 1, 1, 1)
    shared = 0.5 * torch.randn(6, 2, 2, 2, generator=g, dtype=torch.float64)
    inputs = NoisedPairs(
        target + shared + 0.4, torch.arange(3).repeat(2), target, {"hidden": torch.zeros(6, 1, 1)}
    )
    model = Rotated(3, 8)
    residual = (predict(SD15(), model, inputs) - target).detach()
    want = loser_scale(*residual.chunk(2), 0.8, scope)
    assert 0 < want.min() < 1
    space = BranchGradients(SD15(), alone(), model, 0.8)
    found = (
        step_scale(space, (inputs, KEYS)) if scope == "batch" else space.pair_scales(inputs, KEYS)
    )
    torch.testing.assert_close(found, want)
    # Were the map no isometry, it would be another.
    model.rotation *= torch.linspace(0.2, 2, 8, dtype=torch.float64)
    residual = (predict(SD15(), model, inputs) - target).detach()
    stretched = space.pair_scales(inputs, KEYS)
    assert (stretched - loser_scale(*residual.chunk(2), 0.8, "pair")).abs().max() > 1e-2


@pytest.fixture(scope="module")
def adapted(double_unet):
    """`adapted(dropout)`: the UNet with adapters that have moved, in training mode."""

    def make(dropout):
        unet = copy.deepcopy(double_unet)
        flags = {"lora_rank": 2, "lora_alpha": 2, "lora_dropout": dropout, "use_dora": False}
        targets = {"lora_target_modules": ("to_q", "to_v", "conv1")}
        config = ModelConfig(**flags, **targets)
        add_adapters(unet, config, 0, torch.float64, torch.device("cpu"))
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (p for p in unet.parameters() if p.requires_grad):
                p.add_(0.3 * torch.randn(p.shape, generator=rng))
        return unet.double().train()

    return make


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_of_adapters_alone(adapted, pairs, dropout):
    unet = adapted(dropout)
    keys = KEYS if dropout else None
    space = BranchGradients(SD15(), alone(), unet, MU, dropout > 0)
    trained = sum(p.numel() for p in space.parameters)
    winner, loser = flat_gradients(unet, pairs, keys)
    assert len(winner) == trained < 0.5 * sum(p.numel() for p in unet.parameters())
    found = step_scale(space, (pairs, KEYS))
    assert found.item() == pytest.approx(expected(winner, loser), rel=1e-9)
    want = [expected(*flat_gradients(unet, pairs, keys, only=i)) for i in range(3)]
    assert space.pair_scales(pairs, KEYS).tolist() == pytest.approx(want, rel=1e-9)
    if dropout:
        other = flat_gradients(unet, pairs, [(9, 9, 9)])
        assert abs(expected(*other) - found.item()) > 1e-6


@pytest.mark.parametrize("dropout", [False, True])
def test_leaves_no_gradients_behind(double_unet, pairs, dropout):
    space = BranchGradients(SD15(), alone(), double_unet, MU, dropout)
    step_scale(space, (pairs, KEYS))
    space.pair_scales(pairs, KEYS)
    assert all(p.grad is None for p in double_unet.parameters())


def test_holds_few_gradients_at_a_time(double_unet, pairs, monkeypatch):
    """Sums and one more of a branch; of single pairs, the winner's while the loser's is taken."""
    given, alive = [], []
    take = torch.autograd.grad

    def watched(*args, **kwargs):
        alive.append(sum(reference() is not None for reference in given))
        gradients = take(*args, **kwargs)
        given.append(weakref.ref(gradients[0]))
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", watched)
    space = BranchGradients(SD15(), alone(), double_unet, MU)
    step_scale(space, *[(pairs, KEYS)] * 3)
    # The first two are the sums, until others take their place.
    assert alive == [0, 1, 2, 1, 0, 0]
    alive.clear()
    space.pair_scales(pairs, KEYS)
    assert alive == [0, 1] * 3


@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_checkpointing_and_channels_last_change_nothing(double_unet, pairs, dropout):
    unet = copy.deepcopy(double_unet).to(memory_format=torch.channels_last).train()
    unet.enable_gradient_checkpointing()
    spaces = [BranchGradients(SD15(), alone(), double_unet, MU)]
    spaces.append(BranchGradients(SD15(), alone(), unet, MU, dropout))
    scales = [step_scale(space, *[(pairs, KEYS)] * 2) for space in spaces]
    torch.testing.assert_close(scales[1], scales[0], rtol=1e-9, atol=0)


def test_in_half_precision(double_unet, pairs):
    """bf16 autocast of float32 weights; and fp16's gradient scaler, which cancels."""
    want = expected(*flat_gradients(double_unet, pairs))
    unet = copy.deepcopy(double_unet).float()
    condition = {"hidden": pairs.conditions["hidden"].float()}
    inputs = NoisedPairs(pairs.noisy.float(), pairs.timesteps, pairs.target.float(), condition)
    half = alone(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    found = step_scale(BranchGradients(SD15(), half, unet, MU), (inputs, KEYS))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(want, rel=0.05)
    scaled = []

    def scale(error):
        scaled.append(error)
        return 1024 * error

    scaler = alone(scaler=SimpleNamespace(scale=scale))
    plain = step_scale(BranchGradients(SD15(), alone(), unet, MU), (inputs, KEYS))
    assert plain.item() == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(
        step_scale(BranchGradients(SD15(), scaler, unet, MU), (inputs, KEYS)), plain
    )
    assert len(scaled) == 2


def test_products_are_sums_over_all_tensors():
    a = [torch.arange(6.0).reshape(2, 3), torch.tensor(3.0)]
    b = [torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor(-2.0)]
    assert inner_product(a, b).item() == 9.0
    assert gradient_scale(b, a, 0.5).item() == pytest.approx(0.5 * 10 / 9)


def test_mu_outside_its_range_is_refused(double_unet, pairs):
    with pytest.raises(ValueError, match="mu must lie"):
        BranchGradients(SD15(), alone(), double_unet, 1.5).pair_scales(pairs, KEYS)

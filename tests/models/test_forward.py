"""The UNet's inputs, the predictions, and the frozen reference."""

from __future__ import annotations

import copy

import pytest
import torch

from sdpo import preference_loss
from sdpo.data.pairs import PairBatch
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import (
    drawn_losers,
    no_losers,
    noise_pairs,
    predict,
    predict_reference,
)
from sdpo.models.reference import make_reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def models(request, tiny_sd15, tiny_sdxl):
    """(family, unet, frozen) of either family."""
    family = get_family(request.param)
    source = ModelSource(str(tiny_sdxl if family.sdxl else tiny_sd15))
    return family, family.load_unet(source), family.load_frozen(source)


def make_batch(pairs=2, first=0):
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand((2, 8, 3, 64, 64), generator=g)[:, first : first + pairs] * 2 - 1
    captions = ["a red square", "", "two blue circles", "x", "y", "z", "u", "v"]
    keys = [(0, 0, first + i) for i in range(pairs)]
    return PairBatch(pixels.reshape(-1, 3, 64, 64), captions[first : first + pairs], keys)


def noised(models, batch, **kwargs):
    return noise_pairs(ModelEncoder(models[0], models[2], 64, CPU), batch, **kwargs)


def signal_and_noise(models, inputs):
    """sqrt(alpha_bar), sqrt(1 - alpha_bar) per sample, from the betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[inputs.timesteps].reshape(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


def latents_of(models, inputs):
    signal, noise = signal_and_noise(models, inputs)
    return (inputs.noisy.double() - noise * inputs.target.double()) / signal


def test_both_branches_share_timestep_noise_and_condition(models):
    inputs = noised(models, make_batch(3))
    assert inputs.noisy.shape == inputs.target.shape == (6, 4, 16, 16)
    assert torch.equal(inputs.timesteps[:3], inputs.timesteps[3:])
    assert len(set(inputs.timesteps.tolist())) > 1
    assert torch.equal(inputs.target[:3], inputs.target[3:])
    assert inputs.target[:3].std().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(inputs.target[0], inputs.target[1])
    for tensor in inputs.conditions.values():
        assert len(tensor) == 6
        assert torch.equal(tensor[:3], tensor[3:])
    extra = {"text_embeds", "time_ids"} if models[0].sdxl else set()
    assert set(inputs.conditions) == {"hidden"} | extra


def test_noisy_latents_are_the_posteriors_samples_noised(models):
    frozen = models[2]
    batch = make_batch(2)
    inputs = noised(models, batch, timesteps=torch.tensor([10, 300]))
    assert inputs.timesteps.tolist() == [10, 300, 10, 300]
    posterior = frozen.vae.encode(batch.pixels).latent_dist
    z = (latents_of(models, inputs) / frozen.vae.config.scaling_factor - posterior.mean) / (
        posterior.std
    )
    assert z.mean().abs() < 0.1
    assert z.std().item() == pytest.approx(1, abs=0.05)
    # Winner and loser are sampled from their posteriors independently, and not with the noise.
    for other in (z[2:], inputs.target[:2].double()):
        correlation = torch.corrcoef(torch.stack([z[:2].flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.1


def test_a_pairs_inputs_do_not_depend_on_its_batch(models):
    together = noised(models, make_batch(4))
    for first in (0, 2):
        apart = noised(models, make_batch(2, first))
        for half in (0, 1):
            mine, theirs = apart.half(half), together.half(half)
            keep = slice(first, first + 2)
            torch.testing.assert_close(mine.noisy, theirs.noisy[keep], rtol=1e-4, atol=1e-4)
            assert torch.equal(mine.target, theirs.target[keep])
            assert torch.equal(mine.timesteps, theirs.timesteps[keep])


def test_noise_offset_is_part_of_noise_and_target(models):
    plain, offset = noised(models, make_batch()), noised(models, make_batch(), noise_offset=0.5)
    moved = offset.target - plain.target
    per_channel = moved.mean((2, 3), keepdim=True)
    torch.testing.assert_close(moved, per_channel.expand_as(moved), rtol=0, atol=1e-5)
    assert len(set(per_channel.flatten().tolist())) == 8, "one for each of 2 pairs x 4 channels"
    assert 0.1 < per_channel.std() < 1.2
    assert torch.equal(moved[:2], moved[2:])
    _, noise = signal_and_noise(models, plain)
    torch.testing.assert_close(
        (offset.noisy - plain.noisy).double(), noise * moved.double(), rtol=0, atol=1e-5
    )


def test_input_perturbation_is_not_part_of_the_target(models):
    plain = noised(models, make_batch())
    perturbed = noised(models, make_batch(), input_perturbation=0.1)
    assert torch.equal(plain.target, perturbed.target)
    _, noise = signal_and_noise(models, plain)
    extra = (perturbed.noisy - plain.noisy).double() / noise
    assert extra.std().item() == pytest.approx(0.1, rel=0.1)
    torch.testing.assert_close(extra[:2], extra[2:], rtol=0, atol=1e-4)
    correlation = torch.corrcoef(torch.stack([extra.flatten(), plain.target.flatten().double()]))
    assert abs(correlation[0, 1]) < 0.1


def test_no_input_carries_a_gradient(models):
    inputs = noised(models, make_batch())
    tensors = (inputs.noisy, inputs.target, *inputs.conditions.values())
    assert not any(x.requires_grad for x in tensors)


def test_predict_is_the_unets_output(models):
    inputs = noised(models, make_batch())
    added = {k: v for k, v in inputs.conditions.items() if k != "hidden"}
    want = models[1](
        inputs.noisy,
        inputs.timesteps,
        encoder_hidden_states=inputs.conditions["hidden"],
        **({"added_cond_kwargs": added} if added else {}),
    ).sample
    assert torch.equal(predict(models[0], models[1], inputs), want)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_predicting_winners_only_gives_the_same_with_no_gradient_for_losers(models, dtype):
    inputs = noised(models, make_batch())
    unet = copy.deepcopy(models[1])

    def gradients(forward):
        unet.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            prediction = forward(models[0], unet, inputs)
        loss = preference_loss("sft", prediction, prediction, inputs.target, beta=1.0).loss
        loss.backward()
        found = {k: None if p.grad is None else p.grad.clone() for k, p in unet.named_parameters()}
        return prediction.detach().float(), found

    def winners_only(family, model, inputs):
        return predict(family, model, inputs, no_losers([(0, 0, i) for i in range(2)]))

    want, want_grad = gradients(predict)
    found, found_grad = gradients(winners_only)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, want, **tolerance)
    assert all(g is not None for g in want_grad.values())
    assert [k for k, g in found_grad.items() if g is None] == []
    for name, gradient in want_grad.items():
        difference = (found_grad[name] - gradient).norm()
        assert difference <= (0.05 if dtype else 1e-3) * gradient.norm() + 1e-6, name
    leaf = winners_only(models[0], unet, inputs)
    (gradient,) = torch.autograd.grad(leaf[2:].sum(), [unet.conv_in.weight], allow_unused=True)
    assert gradient is None or gradient.abs().max() == 0
    (gradient,) = torch.autograd.grad(
        winners_only(models[0], unet, inputs)[:2].sum(), [unet.conv_in.weight]
    )
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("one_in", [1, 2, 3, 8])
def test_of_neighbouring_pairs_one_loser_is_drawn(one_in):
    keys = [(seed, epoch, place) for seed in (0, 1) for epoch in (0, 1) for place in range(240)]
    drawn = drawn_losers(keys, one_in)
    blocks = drawn.reshape(-1, one_in)
    assert (blocks.sum(1) == 1).all()
    # Each with the same chance, and a function of its own key alone.
    assert (blocks.double().mean(0) - 1 / one_in).abs().max() < 0.12
    alone = torch.cat([drawn_losers([key], one_in) for key in keys[100:130]])
    assert torch.equal(alone, drawn[100:130])


def test_the_mean_over_all_draws_is_the_whole_gradient(double_unet, pairs):
    """Of three pairs one loser, three times as much."""
    family = get_family("sd15")
    parameters = list(double_unet.parameters())
    reference = pairs.target + 0.1

    def gradient(drawn):
        output = preference_loss(
            "diffusion-dpo", predict(family, double_unet, pairs, drawn), reference, pairs.target,
            beta=30.0, mu=0.5, scope="pair", loser_weights=None if drawn is None else 3 * drawn,
        )  # fmt: skip
        return output.loss.item(), torch.autograd.grad(output.loss, parameters)

    loss, whole = gradient(None)
    draws = [gradient(torch.arange(3) == i) for i in range(3)]
    for found, _ in draws:
        assert found == pytest.approx(loss, rel=1e-12)
    assert not torch.allclose(draws[0][1][0], whole[0], rtol=1e-3)
    for i, wanted in enumerate(whole):
        mean = sum(gradients[i] for _, gradients in draws) / 3
        torch.testing.assert_close(mean, wanted, rtol=1e-9, atol=1e-14)


def test_where_all_losers_are_drawn_nothing_changes(double_unet, pairs):
    family = get_family("sd15")
    wanted = predict(family, double_unet, pairs)
    found = predict(family, double_unet, pairs, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_starts_at_margin_zero(models, dtype):
    unet = copy.deepcopy(models[1]).train()
    reference = make_reference(unet, dtype)
    inputs = noised(models, make_batch())
    half = dtype == torch.bfloat16

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    frozen = predict_reference(models[0], reference, inputs, autocast())
    with autocast():
        prediction = predict(models[0], unet, inputs)
    assert torch.equal(prediction, frozen)
    output = preference_loss("diffusion-dpo", prediction, frozen, inputs.target, beta=5000.0)
    for name in ("margin", "winner_drift", "loser_drift", "implicit_acc"):
        assert output.metrics[name].item() == 0.0
    assert output.loss.item() == pytest.approx(0.693147, rel=1e-5)
    if half:
        exact = predict(models[0], unet, inputs)
        assert not torch.equal(exact, prediction.float()), "autocast should have had an effect"


def test_reference_is_frozen_smaller_and_apart(models):
    unet = copy.deepcopy(models[1])
    reference = make_reference(unet, torch.bfloat16)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in unet.parameters())

    def size(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())

    assert size(reference) < 0.6 * size(unet)
    before = reference.conv_in.weight.clone()
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    assert torch.equal(reference.conv_in.weight, before)

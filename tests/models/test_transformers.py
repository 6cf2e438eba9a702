"""Every diffusion transformer against diffusers' own pipeline, on micro bases with random weights:
captions, the denoiser's call, packing, normalisation, the process, gradients of an adapter."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from micro_bases import BUILD, DYNAMIC, save_base

from sdpo.common.errors import UserError
from sdpo.config.families import FAMILIES
from sdpo.evaluation.generate.protocols import Diffusers, Sampling
from sdpo.models import get_family
from sdpo.models.base import ModelSource, _of_diffusers
from sdpo.models.noise import RectifiedFlow, base_shift
from sdpo.models.transformer import pack, unpack

CAPTIONS = ["a red square on a blue background", "", "word " * 60]
# Latents' side of a 64 px image.
SIDE = dict.fromkeys(BUILD, 16) | dict.fromkeys(("qwen-image", "lumina-2", "flux2-klein"), 8)
# What encodes captions by `TransformerFamily.encode_prompts`.
MASKED = ("pixart-sigma", "sana", "lumina-2")


@pytest.fixture(scope="module", params=BUILD)
def loaded(request, tmp_path_factory):
    """(family, source, frozen, diffusers' own pipeline)."""
    path = tmp_path_factory.mktemp("base") / request.param
    pipeline = save_base(request.param, path)
    family, source = get_family(request.param), ModelSource(str(path))
    family.check(source)
    return family, source, family.load_frozen(source), pipeline


def recorded(loaded, prompts):
    """What the pipeline's loop asks of its transformer, and what comes of it."""
    family, _, _, pipeline = loaded
    # Without guidance, by which the model is asked once a step: 0 is none to Z-Image, 1 to others.
    unguided = 0.0 if family.name == "z-image" else 1.0
    calls, forward = [], pipeline.transformer.forward

    def record(*args, **kwargs):
        calls.append((args, kwargs, forward(*args, **kwargs)[0]))
        return (calls[-1][2],)

    pipeline.transformer.forward = record
    try:
        pipeline(
            **family.call_options(pipeline, prompts, unguided), height=64, width=64,
            num_inference_steps=2, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    finally:
        pipeline.transformer.forward = forward
    return calls


def of_a_call(family, args, kwargs, output):
    """(x_t, time) of what a pipeline asked, and the prediction in the answer."""
    side = SIDE[family.name]
    if family.name == "z-image":
        return torch.stack(args[0])[:, :, 0], 1 - args[1], -torch.stack(list(output))[:, :, 0]
    if family.name == "pixart-sigma":
        return args[0], kwargs["timestep"], output[:, :4]
    if family.name == "sana":
        return args[0], kwargs["timestep"] / 1000, output
    if family.name == "lumina-2":
        return kwargs["hidden_states"], 1 - kwargs["timestep"], -output
    if family.name == "flux2-klein":
        x_t, wanted = (
            tokens.transpose(1, 2).unflatten(2, (side, side))
            for tokens in (kwargs["hidden_states"], output)
        )
        return x_t, kwargs["timestep"], wanted
    return (
        unpack(kwargs["hidden_states"], side, side),
        kwargs["timestep"],
        unpack(output, side, side),
    )


def flowing(loaded):
    """What is loaded of a rectified flow."""
    if not loaded[0].facts.flow:
        pytest.skip("its schedule is one of betas")
    return loaded


def test_predict_is_the_pipelines_own_call(loaded):
    family, source, frozen, _ = loaded
    conditions = family.encode_captions(frozen, CAPTIONS[::2], 64)
    model = family.load_unet(source).eval()
    calls = recorded(loaded, CAPTIONS[::2])
    assert len(calls) == 2
    for args, kwargs, output in calls:
        x_t, time, wanted = of_a_call(family, args, kwargs, output)
        with torch.no_grad():
            found = family.predict(model, x_t, time, conditions)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert found.std() > 0


def test_images_are_the_pipelines(loaded):
    """Generation of sdpo makes what diffusers' pipeline makes, up to rounding to 255 levels."""
    family, source, frozen, pipeline = loaded
    prompts, guidance = ["a red square", "blue"], family.facts.guidance
    sampling = Sampling(2, guidance, 3, 64, torch.float32)
    cpu = torch.device("cpu")
    protocol = Diffusers(family, family.load_unet(source), frozen, source, sampling, cpu)
    found = protocol(prompts, [0, 5])
    wanted = pipeline(
        **family.call_options(pipeline, prompts, guidance), height=64, width=64,
        num_inference_steps=2, generator=[torch.Generator().manual_seed(s) for s in (3, 8)],
    ).images  # fmt: skip
    assert [image.size for image in found] == [(64, 64)] * 2
    pixels = [np.stack(images).astype(int) for images in (found, wanted)]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    assert found[0].tobytes() != found[1].tobytes()


def test_an_empty_caption_is_what_guidance_takes(loaded):
    family, _, frozen, pipeline = loaded
    if family.name not in MASKED:
        pytest.skip("its pipeline has no instruction that guidance lacks")
    found = family.encode_text(frozen, [CAPTIONS[0], ""])
    tokens = found["hidden"].shape[1]
    _, _, none, mask = pipeline.encode_prompt(CAPTIONS[0], max_sequence_length=tokens)
    assert torch.equal(found["hidden"][1:], none)
    assert torch.equal(found["mask"][1:].bool(), mask.bool())
    alone = family.encode_text(frozen, [CAPTIONS[0]])
    torch.testing.assert_close(found["hidden"][:1], alone["hidden"])
    assert torch.equal(found["mask"][:1], alone["mask"])


def test_a_long_caption_is_whole_in_half_precision(loaded):
    """bf16 has no 299, by which a mask would be cut."""
    family, *_ = loaded
    text = {"hidden": torch.ones(2, 300, 8), "mask": torch.ones(2, 300, dtype=torch.bfloat16)}
    text["mask"][:, 297:] = 0
    assert family.conditions(text, torch.zeros(2, 6))["mask"].shape == (2, 297)


def test_a_caption_does_not_depend_on_its_company(loaded):
    """Nor does a prediction: captions of other lengths in the batch change nothing."""
    family, source, frozen, _ = loaded
    model = family.load_unet(source).eval()
    side, channels = SIDE[family.name], family.latent_shape(frozen, 64)[0]
    x_t = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.5, 0.9])
    together, alone = (
        family.encode_captions(frozen, captions, 64) for captions in (CAPTIONS, CAPTIONS[:1])
    )
    with torch.no_grad():
        found = family.predict(model, x_t, sigma, together)[:1]
        wanted = family.predict(model, x_t[:1], sigma[:1], alone)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_latents_are_the_pipelines(loaded):
    """Decoded as the pipeline decodes what `normalise` gave, an image is what the VAE makes of
    it; `denormalise` undoes `normalise`."""
    family, _, frozen, pipeline = loaded
    shape = family.latent_shape(frozen, 64)
    assert shape[1:] == (SIDE[family.name],) * 2
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_posterior(frozen, pixels)
    assert mean.shape == std.shape == (2, *shape)
    numbers = family.normalising(frozen.vae.config)
    normal = family.normalise(mean, numbers)
    json.dumps(numbers)
    assert torch.equal(normal, family.normalise(mean, frozen.vae.config))
    torch.testing.assert_close(family.denormalise(normal, numbers), mean)
    if family.name == "flux2-klein":
        wanted = pipeline._encode_vae_image(pixels, None)
        torch.testing.assert_close(family.encode_images(frozen, pixels, torch.ones(shape)), wanted)
    if family.name == "qwen-image":
        config = frozen.vae.config
        by_hand = (mean[:, 1] - config.latents_mean[1]) / config.latents_std[1]
        torch.testing.assert_close(normal[:, 1], by_hand)


def test_the_shift_is_the_schedulers(loaded):
    """Sigmas that the process shifts are those that the base's scheduler makes."""
    family, source, frozen, _ = flowing(loaded)
    scheduler = family.load_scheduler(source)
    shape = family.latent_shape(frozen, 64)
    process = family.process(scheduler, shape)
    assert isinstance(process, RectifiedFlow)
    plain = torch.tensor([0.9, 0.5, 0.1])
    more = {}
    if scheduler.config.get("use_dynamic_shifting"):
        slope = (1.15 - 0.5) / (4096 - 256)
        more["mu"] = 0.5 + slope * (family.tokens(shape) - 256)
    if "flow_shift" in scheduler.config:  # a solver, which takes none of others' choice
        plain = 1 - torch.linspace(1e-3, 1, 4)[:3]
        scheduler.set_timesteps(3)
    else:
        scheduler.set_timesteps(sigmas=plain.tolist(), **more)
    shifted = process.shift * plain / (1 + (process.shift - 1) * plain)
    torch.testing.assert_close(scheduler.sigmas[:3], shifted)


def test_a_prediction_of_noise_takes_a_euler_step_to_the_image(loaded):
    family, source, frozen, _ = flowing(loaded)
    process = family.process(family.load_scheduler(source), family.latent_shape(frozen, 64))
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 0.5, 0.99):
        times = torch.full((3,), sigma)
        x_t, velocity = (f(clean, noise, times) for f in (process.noised, process.target))
        torch.testing.assert_close(x_t - sigma * velocity, clean, rtol=1e-4, atol=1e-5)


def test_adapters_reach_the_layers_that_are_named(loaded, tmp_path):
    """Every default target is found, and a file written is read by diffusers."""
    from sdpo.config import ModelConfig
    from sdpo.models.lora import add_adapters, save_adapters

    family, source, frozen, pipeline = loaded
    if not family.facts.lora_targets:
        pytest.skip("diffusers reads no LoRA of it")
    model = family.load_unet(source)
    config = ModelConfig(
        lora_rank=2, lora_alpha=2.0, lora_target_modules=FAMILIES[family.name].lora_targets
    )
    add_adapters(model, config, 0, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.1)
    save_adapters(model, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    conditions = family.encode_captions(frozen, CAPTIONS[:1], 64)
    x_t = torch.randn(1, *family.latent_shape(frozen, 64))
    with torch.no_grad():
        found, wanted = (
            family.predict(m.eval(), x_t, torch.tensor([0.5]), conditions)
            for m in (model, pipeline.transformer)
        )
    pipeline.unload_lora_weights()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_packing():
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 1].tolist() == [
        latents[0, c, y, x].item() for c in range(3) for y in (0, 1) for x in (2, 3)
    ]
    assert torch.equal(unpack(tokens, 4, 6), latents)


def test_base_shift():
    assert base_shift({"shift": 3.0}, 1024) == 3.0
    assert base_shift({}, 1024) == 1.0
    assert base_shift(DYNAMIC, 4096) == pytest.approx(2.718281828**1.15)
    assert base_shift({**DYNAMIC, "time_shift_type": "linear"}, 256) == 0.5


def test_a_diffusers_that_computes_something_else_is_one_sentence(monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.36.0")
    with pytest.raises(UserError, match=r"Qwen-Image needs diffusers 0.37 or later, .* is 0.36.0"):
        get_family("qwen-image").check(ModelSource("base"))


def test_a_model_that_this_diffusers_lacks_is_one_sentence():
    with pytest.raises(UserError, match="has no NoSuchModel: pip install -U diffusers"):
        _of_diffusers("NoSuchModel")

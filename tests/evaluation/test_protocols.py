"""Sampling by both protocols, against a loop and a pipeline that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdpo.common.precision import DTYPES
from sdpo.evaluation.generate.config import DTYPE_NAMES, PROTOCOL_NAMES
from sdpo.evaluation.generate.protocols import PROTOCOLS, Sampling
from sdpo.models import get_family
from sdpo.models.base import ModelSource

PROMPTS = ["a red circle at the center on a white background", "", "a blue square, unheard of"]
SIZE = 32


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, tiny_sd15, tiny_sdxl):
    """(family, directory of its tiny model)."""
    return get_family(request.param), {"sd15": tiny_sd15, "sdxl": tiny_sdxl}[request.param]


def build(name, base, dtype="fp32", steps=4, cfg=3.0, seed=0, device="cpu", offload=False):
    family, directory = base
    source = ModelSource(base=str(directory))
    return PROTOCOLS[name](
        family,
        family.load_unet(source),
        family.load_frozen(source),
        source,
        Sampling(steps, cfg, seed, SIZE, DTYPES[dtype]),
        torch.device(device),
        offload,
    )


def array(images):
    return np.stack([np.asarray(image) for image in images]).astype(np.int16)


def called(unet, x, t, told):
    """The UNet's output, called as diffusers documents it."""
    added = {name: value for name, value in told.items() if name != "hidden"}
    return unet(x, t, encoder_hidden_states=told["hidden"], added_cond_kwargs=added).sample


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@torch.no_grad()
def test_paper_is_the_published_loop(base, spacing, tmp_path):
    """Euler's method on the probability flow, written from the noise schedule up, in float64."""
    import json
    import shutil

    family, directory = base
    copy = tmp_path / "base"
    shutil.copytree(directory, copy)
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    # Stable Diffusion 1.5's own file does not name a spacing, SDXL's does.
    config.pop("timestep_spacing", None)
    if spacing == "leading":
        config["timestep_spacing"] = "leading"
    path.write_text(json.dumps(config))
    steps, c = 5, 3.0
    found = array(build("paper", (family, copy), steps=steps, cfg=c)(PROMPTS, [0, 1, 2]))

    source = ModelSource(base=str(copy))
    unet, frozen = family.load_unet(source).double(), family.load_frozen(source)
    for encoder in frozen.text_encoders:
        encoder.double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    sigma = ((1 - alphas) / alphas).sqrt()
    if spacing == "linspace":
        times = torch.linspace(999, 0, steps, dtype=torch.float64)
        sigmas = torch.tensor(np.interp(times, np.arange(1000), sigma))
        first = sigmas[0]
    else:
        times = torch.arange(steps - 1, -1, -1) * (1000 // steps) + config["steps_offset"]
        sigmas = sigma[times]
        first = (sigmas[0] ** 2 + 1).sqrt()
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    noise = torch.randn(
        (1, *family.latent_shape(frozen, SIZE)), generator=torch.Generator().manual_seed(0)
    )
    expected = []
    for prompt in PROMPTS:
        cond, uncond = (family.encode_captions(frozen, [p], SIZE) for p in (prompt, ""))
        x = noise.double() * first
        for i, t in enumerate(times):
            scaled = x / (sigmas[i] ** 2 + 1).sqrt()
            e_cond, e_uncond = (called(unet, scaled, t, told) for told in (cond, uncond))
            # c = 3 here is 4 in diffusers' convention
            x = x + (sigmas[i + 1] - sigmas[i]) * (e_uncond + (c + 1) * (e_cond - e_uncond))
        decoded = frozen.vae.decode(x.float() / frozen.vae.config.scaling_factor).sample
        expected.append(((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte())
    expected = torch.stack(expected).permute(0, 2, 3, 1).numpy().astype(np.int16)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - expected).mean() < 0.01
    assert found.std() > 5


def test_paper_draws_one_noise_in_the_models_dtype(base):
    family, _ = base
    for dtype in ("fp32", "bf16"):
        protocol = build("paper", base, dtype, seed=3)
        shape = (1, *family.latent_shape(protocol.frozen, SIZE))
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=DTYPES[dtype])
        assert protocol.noise.dtype == DTYPES[dtype]
        assert torch.equal(protocol.noise, drawn)
        assert protocol.frozen.vae.dtype == torch.float32
        assert {p.dtype for p in protocol.unet.parameters()} == {DTYPES[dtype]}
        assert {e.dtype for e in protocol.frozen.text_encoders} == {DTYPES[dtype]}
        assert protocol.seed_of(5) == 3
    same = array(protocol(["x"] * 2, [0, 7]))
    assert np.array_equal(same[0], same[1])


def test_paper_settings_are_described(base):
    described = build("paper", base, cfg=7.5).describe()
    assert described["guidance_scale_diffusers"] == 8.5
    assert described["scheduler"] == "EulerDiscreteScheduler"
    assert described["scheduler_config"]["beta_schedule"] == "scaled_linear"
    assert described["vae_dtype"] == "torch.float32"


def test_diffusers_is_the_plain_pipeline(base):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    family, directory = base
    cls = StableDiffusionXLPipeline if family.sdxl else StableDiffusionPipeline
    pipeline = cls.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    protocol = build("diffusers", base, seed=5)
    for index, prompt in ((2, PROMPTS[0]), (9, PROMPTS[2])):
        expected = pipeline(
            prompt,
            height=SIZE,
            width=SIZE,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5 + index),
        ).images
        assert np.array_equal(array(protocol([prompt], [index])), array(expected))
        assert protocol.seed_of(index) == 5 + index
    different = array(protocol(["x"] * 2, [0, 7]))
    assert not np.array_equal(different[0], different[1])
    assert protocol.describe()["guidance_scale_diffusers"] == 3.0


@pytest.mark.parametrize("name", PROTOCOL_NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_does_not_matter(base, name, dtype):
    protocol = build(name, base, dtype)
    together = array(protocol(PROMPTS, [0, 1, 2]))
    again = array(protocol(PROMPTS, [0, 1, 2]))
    alone = np.concatenate([array(protocol([p], [i])) for i, p in enumerate(PROMPTS)])
    assert np.array_equal(together, again)
    difference = np.abs(together - alone)
    assert difference.max() <= (1 if dtype == "fp32" else 24)
    assert difference.mean() < (0.01 if dtype == "fp32" else 1)


@pytest.mark.parametrize("name", PROTOCOL_NAMES)
def test_offloaded_text_encoders_make_the_same_images(base, name):
    wanted = array(build(name, base, "bf16")(PROMPTS, [0, 1, 2]))
    offloaded = build(name, base, "bf16", offload=True)
    for _ in range(2):
        assert np.array_equal(array(offloaded(PROMPTS, [0, 1, 2])), wanted)


def test_text_encoders_are_on_the_device_while_prompts_are_encoded(base, monkeypatch):
    """A copy stands for what would be the device's."""
    family, _ = base
    protocol = build("paper", base, offload=True)
    weights = [p for model in protocol.frozen.text_encoders for p in model.parameters()]

    def places():
        return {p.data_ptr() for p in weights}

    home, seen = places(), {"encode_text": [], "predict": []}
    for method, found in seen.items():
        called = getattr(family, method)

        def watched(*arguments, called=called, found=found):
            found.append(places())
            return called(*arguments)

        monkeypatch.setattr(family, method, watched)
    moved = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **options: moved(*a, **options).clone())
    protocol(PROMPTS, [0, 1, 2])
    assert len(seen["encode_text"]) == 1 and seen["encode_text"][0].isdisjoint(home)
    assert len(seen["predict"]) == 4 and all(place == home for place in seen["predict"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROTOCOL_NAMES)
def test_offloaded_on_an_accelerator(base, name, device):
    wanted = array(build(name, base, "bf16", device=device)(PROMPTS, [0, 1, 2]))
    offloaded = build(name, base, "bf16", device=device, offload=True)
    encoders = offloaded.frozen.text_encoders
    for _ in range(2):
        assert np.array_equal(array(offloaded(PROMPTS, [0, 1, 2])), wanted)
        assert {encoder.device.type for encoder in encoders} == {"cpu"}


def test_names():
    assert set(PROTOCOL_NAMES) == set(PROTOCOLS)
    assert set(DTYPE_NAMES) < set(DTYPES)

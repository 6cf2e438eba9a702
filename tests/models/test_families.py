"""Both model families against what diffusers' own pipelines do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.config.families import family_of_config
from sdpo.models import get_family
from sdpo.models.base import ModelSource, joined, repeat

CAPTIONS = ["a red square on a blue background", "", "word " * 60, "Ünïcode  and spaces "]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def loaded(request, tiny_sd15, tiny_sdxl):
    """(family, source, frozen, diffusers' own pipeline)."""
    import diffusers

    family = get_family(request.param)
    source = ModelSource(str(tiny_sdxl if family.sdxl else tiny_sd15))
    name = "StableDiffusionXLPipeline" if family.sdxl else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name).from_pretrained(source.base)
    return family, source, family.load_frozen(source), pipeline


def test_get_family():
    assert (get_family("sd15").name, get_family("sdxl").name) == ("sd15", "sdxl")
    assert (get_family("sd15").facts.resolution, get_family("sdxl").facts.resolution) == (512, 1024)


def test_captions_are_encoded_as_the_pipeline_does(loaded):
    family, _, frozen, pipeline = loaded
    found = family.encode_captions(frozen, CAPTIONS, 64)
    encoded = pipeline.encode_prompt(
        CAPTIONS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(found["hidden"], encoded[0])
    assert not found["hidden"].requires_grad
    if family.sdxl:
        torch.testing.assert_close(found["text_embeds"], encoded[2])
    else:
        assert set(found) == {"hidden"}
    apart = family.encode_captions(frozen, CAPTIONS[3:], 64)
    torch.testing.assert_close(apart["hidden"], found["hidden"][3:], rtol=1e-4, atol=1e-5)
    assert (found["hidden"][0] - found["hidden"][1]).abs().max() > 1e-3


def test_time_ids(tiny_sdxl):
    import diffusers

    family, source = get_family("sdxl"), ModelSource(str(tiny_sdxl))
    frozen = family.load_frozen(source)
    found = family.encode_captions(frozen, CAPTIONS, 1024)["time_ids"]
    assert found.tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 4
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    size = (1024, 1024)
    want = pipeline._get_add_time_ids(
        size, (0, 0), size, torch.float32, frozen.text_encoders[1].config.projection_dim
    )
    torch.testing.assert_close(found[:1].float(), want)


def test_conditions_repeat_winners_then_losers():
    condition = {"hidden": torch.arange(2.0).reshape(2, 1, 1), "x": torch.arange(2.0)}
    twice = repeat(condition, 2)
    assert twice["hidden"].flatten().tolist() == [0, 1, 0, 1]
    assert twice["x"].tolist() == [0, 1, 0, 1]
    both = joined([condition, twice])
    assert both["hidden"].flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert both["x"].tolist() == [0, 1, 0, 1, 0, 1]


def test_predict_calls_the_model_with_the_conditions(loaded):
    family, _, frozen, _ = loaded
    given = family.encode_captions(frozen, CAPTIONS[:2], 64)
    x_t, t = torch.zeros(2, 4, 16, 16), torch.tensor([1, 2])
    asked = {}

    def model(*args, **kwargs):
        asked.update(kwargs, args=args)
        return (x_t,)

    assert family.predict(model, x_t, t, given) is x_t
    assert asked.pop("args") == (x_t, t)
    assert asked.pop("return_dict") is False
    extra = {"added_cond_kwargs"} if family.sdxl else set()
    assert set(asked) == {"encoder_hidden_states"} | extra
    assert asked["encoder_hidden_states"] is given["hidden"]


def test_denormalise_undoes_normalise(loaded):
    family = loaded[0]
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    shifted = {"scaling_factor": 1.5, "shift_factor": 0.6}
    for vae in ({"scaling_factor": 0.18, "shift_factor": None}, shifted):
        there = family.normalise(latents, vae)
        torch.testing.assert_close(
            there, (latents - (vae["shift_factor"] or 0)) * vae["scaling_factor"]
        )
        torch.testing.assert_close(family.denormalise(there, vae), latents)


def test_latents(loaded):
    family, _, frozen, pipeline = loaded
    shape = family.latent_shape(frozen, 64)
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand((3, 3, 64, 64), generator=g) * 2 - 1
    noise = torch.randn((3, *shape), generator=g)
    found = family.encode_images(frozen, pixels, noise)
    with torch.no_grad():
        moments = pipeline.vae.quant_conv(pipeline.vae.encoder(pixels))
    mean, logvar = moments.chunk(2, dim=1)
    want = (
        mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise
    ) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert found.shape == (3, *shape) == (3, 4, 16, 16)
    assert family.latent_shape(frozen, 128) == (4, 32, 32)


def test_latents_with_a_shift(loaded):
    family, _, frozen, _ = loaded
    pixels, noise = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 16, 16)
    plain = family.encode_images(frozen, pixels, noise)
    frozen.vae.register_to_config(shift_factor=2.0)
    shifted = family.encode_images(frozen, pixels, noise)
    frozen.vae.register_to_config(shift_factor=None)
    torch.testing.assert_close(
        plain - shifted, 2.0 * frozen.vae.config.scaling_factor * torch.ones_like(plain)
    )


def test_frozen_parts_are_frozen(loaded):
    _, _, frozen, _ = loaded
    for module in (frozen.vae, *frozen.text_encoders):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert frozen.scheduler.config.prediction_type == "epsilon"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(frozen.scheduler.betas, betas)


def test_pipeline_samples_what_diffusers_own_would(loaded):
    family, source, frozen, own = loaded
    pipeline = family.pipeline(family.load_unet(source), frozen, source)
    assert type(pipeline.scheduler) is type(own.scheduler)

    def sample(pipe):
        pipe.set_progress_bar_config(disable=True)
        return np.asarray(
            pipe(
                "a red square",
                height=64,
                width=64,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
            ).images[0]
        )

    image = sample(pipeline)
    assert image.shape == (64, 64, 3)
    assert np.abs(image.astype(int) - sample(own).astype(int)).max() <= 1
    assert image.std() > 0


def edited_copy(source, tmp_path, file, **changes):
    """A copy of a pipeline with values of one config changed."""
    shutil.copytree(source, tmp_path / "edited")
    path = tmp_path / "edited" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ModelSource(str(tmp_path / "edited"))


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
def test_a_base_that_predicts_neither_noise_nor_velocity_is_refused(
    tiny_sd15, tmp_path, prediction
):
    source = edited_copy(
        tiny_sd15, tmp_path, "scheduler/scheduler_config.json", prediction_type=prediction
    )
    with pytest.raises(UserError, match=f"predicts {prediction}; .*epsilon"):
        get_family("sd15").load_frozen(source)


def test_the_wrong_family_is_refused(tiny_sd15, tiny_sdxl):
    with pytest.raises(UserError, match=r"SDXL UNet, but the base is of SD1\.5.*add --sdxl"):
        get_family("sd15").load_unet(ModelSource(str(tiny_sdxl)))
    with pytest.raises(UserError, match=r"SD1\.5 UNet, but.*leave --sdxl out"):
        get_family("sdxl").load_unet_config(ModelSource(str(tiny_sd15)))


def test_family_of_config():
    assert family_of_config({"addition_embed_type": "text_time"}) == "sdxl"
    assert family_of_config({"addition_embed_type": None}) == "sd15"
    assert family_of_config({}) == "sd15"
    assert family_of_config({"_class_name": "SD3Transformer2DModel"}) == "sd3"
    assert family_of_config({"_class_name": "Transformer2DModel"}) == "pixart-sigma"
    assert family_of_config({"_class_name": "SomeTransformer"}) is None


def test_a_hub_id_without_a_network_is_one_sentence():
    for load in ("load_unet", "load_frozen", "load_unet_config"):
        with pytest.raises(UserError) as caught:
            getattr(get_family("sd15"), load)(ModelSource("somebody/no-such-model"))
        assert str(caught.value).startswith("--pretrained_model_name_or_path: cannot load ")
        assert "somebody/no-such-model" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_another_vae(tiny_sd15, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_sd15, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    vae.save_pretrained(tmp_path / "vae")
    family = get_family("sd15")
    plain = family.load_frozen(ModelSource(str(tiny_sd15)))
    other = family.load_frozen(ModelSource(str(tiny_sd15), vae=str(tmp_path / "vae")))
    torch.testing.assert_close(other.vae.quant_conv.weight, 2 * plain.vae.quant_conv.weight)
    with pytest.raises(UserError, match=r"^--pretrained_vae_model_name_or_path: cannot load"):
        family.load_frozen(ModelSource(str(tiny_sd15), vae=str(tiny_sd15)))


def test_vae_dtype(loaded):
    family, _, frozen, _ = loaded
    assert family.vae_dtype(frozen.vae, torch.bfloat16) == torch.bfloat16
    frozen.vae.register_to_config(force_upcast=True)
    wanted = torch.float32 if family.sdxl else torch.float16
    assert family.vae_dtype(frozen.vae, torch.float16) == wanted
    frozen.vae.register_to_config(force_upcast=False)
    assert family.vae_dtype(frozen.vae, torch.float16) == torch.float16

"""The shipped base models load, sample and draw what they are told better than chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from sdpo.tinyworld import autoencoder, denoiser, oracle, pretrain, world

ASSETS = Path(__file__).resolve().parents[2] / "assets"
CLASSES = {
    "sd15": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
}


@pytest.fixture(scope="module", params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(family: str) -> DiffusionPipeline:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    return CLASSES[family].from_pretrained(ASSETS / f"tiny-{family}", **absent)


def test_it_loads_in_one_dtype_without_arguments(pipeline: DiffusionPipeline) -> None:
    dtypes = {
        parameter.dtype
        for module in pipeline.components.values()
        if isinstance(module, torch.nn.Module)
        for parameter in module.parameters()
    }
    assert dtypes == {torch.float32}


def test_weights_are_finite(pipeline: DiffusionPipeline) -> None:
    for name in ("vae", denoiser.part_of(pipeline), "text_encoder"):
        for key, value in getattr(pipeline, name).state_dict().items():
            assert torch.isfinite(value.float()).all(), (name, key)


def test_autoencoder_shows_what_it_was_shown(pipeline: DiffusionPipeline) -> None:
    quality = autoencoder.vae_quality(pipeline.vae, 100, seed=99)
    assert quality["follows"] > 0.97
    assert quality["clean"] > 0.75


def test_scaled_latents_are_standardised(pipeline: DiffusionPipeline) -> None:
    images, _ = pretrain.make_dataset(256, seed=99)
    latents = autoencoder.encode_latents(pipeline.vae, images) * pipeline.vae.config.scaling_factor
    assert latents.mean((0, 2, 3)).abs().max() < 0.15
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_samples_beat_chance_but_leave_room(family: str, pipeline: DiffusionPipeline) -> None:
    prompts = world.evaluation_prompts(48, seed=99)
    images = pretrain.sample_images(pipeline, prompts, seed=99)
    scores = oracle.mean_score(images, prompts)
    chance = oracle.chance_level(prompts, seed=99)
    assert scores.follows > chance + 0.2
    assert scores.score < 0.9
    # The same pictures against other captions: it is the prompt that does it.
    shuffled = [prompts[i] for i in np.roll(np.arange(48), 1)]
    assert oracle.mean_score(images, shuffled).follows < scores.follows - 0.15


def test_the_card_and_the_readme_agree(family: str) -> None:
    card = json.loads((ASSETS / f"tiny-{family}" / "card.json").read_text())
    readme = (ASSETS / "README.md").read_text()
    assert card["family"] == family and card["size"] == "small"
    assert card["oracle"]["follows"] > card["oracle"]["chance_follows"]
    for key in ("follows", "clean", "score", "chance_follows"):
        assert str(card["oracle"][key]) in readme, key
    assert card["command"] in readme


def test_assets_stay_small() -> None:
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert total < 20 * 2**20
    # The quickstart's picture stands in the README.
    expected = {"README.md", "quickstart", "tiny-sd15", "tiny-sd3", "tiny-sdxl"}
    assert {p.name for p in ASSETS.iterdir()} == expected

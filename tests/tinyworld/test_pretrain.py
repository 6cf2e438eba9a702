from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from sdpo.common.errors import UserError
from sdpo.tinyworld import architecture, denoiser, oracle, pretrain


def test_dataset_has_the_intended_imperfections() -> None:
    images, captions = pretrain.make_dataset(800, 0)
    assert images.shape == (800, 64, 64, 3) and images.dtype == np.uint8
    again, same = pretrain.make_dataset(800, 0)
    assert np.array_equal(images, again) and captions == same
    scores = [oracle.score(image, text) for image, text in zip(images, captions, strict=True)]
    wrong = np.mean([s.follows < 1.0 for s in scores])
    degraded = np.mean([s.clean < 0.9 for s in scores])
    assert wrong == pytest.approx(pretrain.WRONG_ATTRIBUTE_SHARE, abs=0.05)
    assert degraded == pytest.approx(pretrain.DEGRADED_SHARE, abs=0.05)


@pytest.mark.parametrize("family", architecture.FAMILIES)
def test_training_lowers_the_loss_and_moves_all_parts(family: str) -> None:
    pipeline = architecture.build_pipeline(family, "micro", 0)
    start = {k: p.clone() for k, p in pipeline.text_encoder.named_parameters()}
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(
        8, 1, 1, 1
    )
    captions = ["a red circle", "a blue square", "a cyan triangle", ""] * 8
    steps, rate = (120, 3e-2) if family == "sd3" else (60, 3e-3)
    loss = denoiser.train_denoiser(
        pipeline, latents, captions, steps=steps, batch=8, seed=0, learning_rate=rate
    )
    # Predicting nothing costs 1, of velocities 2.
    assert loss < (1.9 if family == "sd3" else 0.9)
    moved = [k for k, p in pipeline.text_encoder.named_parameters() if not torch.equal(p, start[k])]
    assert "embeddings.token_embedding.weight" in " ".join(moved)
    assert not denoiser.denoiser_of(pipeline).training and not pipeline.text_encoder.training


@pytest.mark.parametrize("family", architecture.FAMILIES)
def test_conditioning_is_that_of_the_pipeline(family: str) -> None:
    pipeline = architecture.build_pipeline(family, "micro", 0)
    prompts = ["a red circle at the center on a white background", ""]
    ids = pipeline.tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        told = {}
        denoiser.denoiser_of(pipeline).forward = lambda *args, **kwargs: (told.update(kwargs),)
        denoiser.predict(pipeline, torch.zeros(2, 4, 16, 16), torch.tensor([3.0, 700.0]), ids)
        options = {"device": torch.device("cpu"), "num_images_per_prompt": 1,
                   "do_classifier_free_guidance": False,
                   **denoiser.sampling_options(pipeline)}  # fmt: skip
        if family == "sd3":
            options |= {"prompt_2": None, "prompt_3": None}
        theirs = pipeline.encode_prompt(prompts, **options)
    ours = told
    assert torch.allclose(ours["encoder_hidden_states"], theirs[0], atol=1e-6)
    if family == "sd3":
        assert torch.allclose(ours["pooled_projections"], theirs[2], atol=1e-6)
        assert ours["encoder_hidden_states"].shape == (2, 48, 32)
    if family == "sdxl":
        assert torch.allclose(ours["added_cond_kwargs"]["text_embeds"], theirs[2], atol=1e-6)
        assert ours["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def command(out: Path) -> list[str]:
    sizes = ["--size", "micro", "--images", "64", "--vae_steps", "3", "--unet_steps", "2"]
    threads = str(torch.get_num_threads())
    return [*sizes, "--eval_images", "2", "--threads", threads, "--out", str(out)]


def test_a_killed_call_goes_on_behind_its_last_stage(tmp_path: Path, monkeypatch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain.main(command(whole))
    kept = killed / "tiny-sd15" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("until all is done")

    trained = []

    def train(pipeline, *arguments, **flags):
        trained.append(type(pipeline).__name__)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(pipeline, *arguments, **flags)

    real = denoiser.train_denoiser
    monkeypatch.setattr(denoiser, "train_denoiser", train)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(command(killed))
    assert [p.name for p in kept.parent.iterdir()] == ["kept"]
    pretrain.main(command(killed))
    # The first family is not trained again, and no stage's result depends on the kill.
    assert trained == [
        "StableDiffusionPipeline",
        *["StableDiffusionXLPipeline"] * 2,
        "StableDiffusion3Pipeline",
    ]
    assert sorted(p.name for p in killed.iterdir()) == ["tiny-sd15", "tiny-sd3", "tiny-sdxl"]
    for weights in whole.rglob("*.safetensors"):
        assert weights.read_bytes() == (killed / weights.relative_to(whole)).read_bytes()


def test_command_writes_both_assets_and_their_cards(tmp_path: Path) -> None:
    pretrain.main(command(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-sd15", "tiny-sd3", "tiny-sdxl"]
    pipelines = []
    for family in architecture.FAMILIES:
        card = json.loads((tmp_path / f"tiny-{family}" / "card.json").read_text())
        assert card["family"] == family and card["oracle"]["images"] == 2
        assert set(card["oracle"]) >= {"follows", "clean", "score", "chance_follows"}
        absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
        pipelines.append(DiffusionPipeline.from_pretrained(tmp_path / f"tiny-{family}", **absent))
    first, *others = (p.vae.state_dict() for p in pipelines)
    assert all(torch.equal(first[k], other[k]) for k in first for other in others)
    assert len({p.vae.config.scaling_factor for p in pipelines}) == 1


@pytest.mark.parametrize(
    ("flag", "value"), [("--unet_steps", "0"), ("--seed", "-1"), ("--vae", "nowhere")]
)
def test_bad_flags_are_named(tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(UserError, match=flag):
        pretrain.main(["--out", str(tmp_path), flag, value])

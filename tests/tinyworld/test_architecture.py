from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from sdpo.common.errors import UserError
from sdpo.tinyworld import architecture, world

CLASSES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {k: m for k, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


@pytest.fixture(scope="module", params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pipelines") / family
    architecture.save_pipeline(architecture.build_pipeline(family, "micro", 3), target)
    return target


def test_round_trip_keeps_every_weight(family: str, saved: Path) -> None:
    loaded = CLASSES[family].from_pretrained(saved)
    built = architecture.build_pipeline(family, "micro", 3)
    assert type(loaded) is CLASSES[family]
    assert set(modules(loaded)) == set(modules(built))
    for name, module in modules(built).items():
        state, other = module.state_dict(), modules(loaded)[name].state_dict()
        assert set(state) == set(other)
        for key, value in state.items():
            assert other[key].dtype == torch.float32
            assert torch.equal(value, other[key]), (name, key)


def test_the_seed_determines_the_weights_and_leaves_the_rng_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = architecture.build_pipeline("sd15", "micro", 0).unet.state_dict()
    assert torch.equal(torch.rand(1), expected)
    again = architecture.build_pipeline("sd15", "micro", 0).unet.state_dict()
    other = architecture.build_pipeline("sd15", "micro", 1).unet.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_the_layout_is_that_of_real_checkpoints(family: str, saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    unet = json.loads((saved / "unet" / "config.json").read_text())
    scheduler = json.loads((saved / "scheduler" / "scheduler_config.json").read_text())
    assert index["_class_name"] == CLASSES[family].__name__
    assert unet["addition_embed_type"] == ("text_time" if family == "sdxl" else None)
    expected = "EulerDiscreteScheduler" if family == "sdxl" else "PNDMScheduler"
    assert scheduler["_class_name"] == expected
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert scheduler["beta_schedule"] == "scaled_linear"
    assert scheduler["prediction_type"] == "epsilon"
    assert scheduler["num_train_timesteps"] == 1000
    for name in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        assert (saved / name / "vocab.json").is_file()
        assert (saved / name / "merges.txt").read_text().startswith("#version")
    for name in ("unet", "vae"):
        assert (saved / name / "diffusion_pytorch_model.safetensors").is_file()


def test_it_samples(family: str, saved: Path) -> None:
    pipeline = CLASSES[family].from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)

    def sample(prompt: str) -> torch.Tensor:
        return pipeline(
            prompt,
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    image = sample("a red circle")
    assert image.shape == (1, 3, 64, 64)
    assert torch.isfinite(image).all()
    assert torch.equal(image, sample("a red circle"))
    # The prompt reaches the UNet: another one gives another image.
    assert not torch.equal(image, sample("a blue square"))


def test_default_size_is_64_pixels(family: str, saved: Path) -> None:
    pipeline = CLASSES[family].from_pretrained(saved)
    assert pipeline.vae_scale_factor == 4
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == world.IMAGE_SIZE


def test_every_parameter_of_the_unet_gets_a_gradient(family: str) -> None:
    pipeline = architecture.build_pipeline(family, "micro", 0)
    unet = pipeline.unet
    extra = {}
    if family == "sdxl":
        pooled = pipeline.text_encoder_2.config.projection_dim
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        extra = {"added_cond_kwargs": {"text_embeds": torch.randn(2, pooled), "time_ids": ids}}
    states = torch.randn(2, 24, unet.config.cross_attention_dim)
    out = unet(torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), states, **extra).sample
    assert out.shape == (2, 4, 16, 16)
    out.square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None] == []


def test_micro_has_all_kinds_of_blocks_and_small_about_a_million_parameters(family: str) -> None:
    small, micro = (architecture.build_pipeline(family, size).unet for size in ("small", "micro"))

    def kinds(unet: torch.nn.Module) -> set[str]:
        return {type(module).__name__ for module in unet.modules()}

    assert kinds(small) == kinds(micro)
    assert 0.9e6 < sum(p.numel() for p in small.parameters()) < 1.2e6
    assert sum(p.numel() for p in micro.parameters()) < 0.1e6


def test_vae_factor_is_four() -> None:
    vae = architecture.build_vae("micro")
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert latents.shape == (1, 4, 16, 16)
    assert vae.decode(latents).sample.shape == (1, 3, 64, 64)


def test_each_world_word_is_one_token() -> None:
    tokenizer = architecture.build_tokenizer()
    for word in world.vocabulary():
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    for text in world.evaluation_prompts(50):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_any_other_text_still_tokenises() -> None:
    tokenizer = architecture.build_tokenizer()
    for text in ("photograph", "Zürich, 1999!", "狐", "🦊 redder"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids and tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_tokens_are_framed_padded_and_cut() -> None:
    tokenizer = architecture.build_tokenizer()
    assert tokenizer.model_max_length == 24
    ids = tokenizer("", padding="max_length", truncation=True).input_ids
    assert ids == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 23
    long = tokenizer("a red circle " * 40, padding="max_length", truncation=True).input_ids
    assert len(long) == 24 and long[-1] == tokenizer.eos_token_id


def test_tokens_survive_saving(saved: Path) -> None:
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(saved, subfolder="tokenizer")
    text = ["a purple triangle below a cyan square on a gray background", "something else"]
    ours = architecture.build_tokenizer()(text, padding="max_length").input_ids
    assert loaded(text, padding="max_length").input_ids == ours
    # As real checkpoints are read: from the two BPE files alone.
    vocab = json.loads((saved / "tokenizer" / "vocab.json").read_text())
    assert len(vocab) == len(loaded)
    assert vocab["<|endoftext|>"] == loaded.eos_token_id == max(vocab.values())


def test_text_pooling_reads_the_end_token(family: str) -> None:
    pipeline = architecture.build_pipeline(family, "micro", 0)
    encoder = pipeline.text_encoder
    assert encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert encoder.config.max_position_embeddings == pipeline.tokenizer.model_max_length
    ids = torch.tensor(pipeline.tokenizer(["a red circle"], padding="max_length").input_ids)
    with torch.no_grad():
        out = encoder(ids)
    # <start> a red circle <end>: the end stands at place 4.
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 4])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="family"):
        architecture.build_pipeline("sd9", "micro")
    with pytest.raises(ValueError, match="size"):
        architecture.build_pipeline("sd15", "huge")


def test_command_line_writes_a_pipeline_and_guards_folders(tmp_path: Path) -> None:
    arguments = ["--family", "sd15", "--size", "micro", "--out"]
    architecture.main([*arguments, str(tmp_path / "a" / "b")])
    architecture.main([*arguments, str(tmp_path / "a" / "b")])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "a" / "b").unet is not None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="--out"):
        architecture.main([*arguments, str(tmp_path / "full")])
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep"
    with pytest.raises(UserError, match="--seed"):
        architecture.main([*arguments, str(tmp_path / "c"), "--seed", "-1"])


def test_wrong_family_exits_with_code_2() -> None:
    command = [sys.executable, "-m", "sdpo.tinyworld.architecture", "--family", "x", "--out", "y"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--family" in result.stderr

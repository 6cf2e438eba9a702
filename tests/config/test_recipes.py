"""The published recipes, scripts/recipes/*.yaml, and configuration files in general."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import yaml

from sdpo.common.errors import UserError
from sdpo.config import TrainConfig, parse_train

SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", None, 512, 1e-8)
SDXL = ("stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix", 1024, 1e-9)
# Base, VAE, pixels, rate per pair; Adafactor and gradient checkpointing; method, beta, mu.
RECIPES = {
    "sd15_diffusion_dpo": (*SD15, False, "diffusion-dpo", 5000, 0.9),
    "sd15_dspo": (*SD15, False, "dspo", 0.001, 0.2),
    "sd15_dmpo": (*SD15, False, "dmpo", 2000, 0.9),
    "sdxl_diffusion_dpo": (*SDXL, True, "diffusion-dpo", 5000, 0.6),
    "sdxl_dspo": (*SDXL, True, "dspo", 5000, 0.6),
    "sdxl_dmpo": (*SDXL, True, "dmpo", 6000, 0.6),
}


# Starting values for other bases: base, pixels, rank, beta.
STARTS = {
    "sd21_v_diffusion_dpo": ("stabilityai/stable-diffusion-2-1", 768, None, 5000),
    "sdxl_v_diffusion_dpo": ("Laxhar/noobai-XL-Vpred-1.0", 1024, None, 5000),
    "sd35_medium_diffusion_dpo": ("stabilityai/stable-diffusion-3.5-medium", 1024, 32, 2000),
    "flux_diffusion_dpo": ("black-forest-labs/FLUX.1-dev", 1024, 32, 2000),
    "qwen_image_diffusion_dpo": ("Qwen/Qwen-Image", 1024, 32, 2500),
    "z_image_diffusion_dpo": ("Tongyi-MAI/Z-Image", 1024, 32, 2500),
    "pixart_sigma_diffusion_dpo": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 1024, None, 5000),
    "sana_diffusion_dpo": (
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        1024,
        32,
        2500,
    ),
    "lumina2_diffusion_dpo": ("Alpha-VLLM/Lumina-Image-2.0", 1024, 32, 5000),
    "flux2_klein_diffusion_dpo": ("black-forest-labs/FLUX.2-klein-base-4B", 1024, 32, 2000),
}


def recipe(repo, name: str, *argv: str) -> TrainConfig:
    file = repo / "scripts" / "recipes" / f"{name}.yaml"
    return parse_train(["--config_file", str(file), *argv])


@pytest.mark.parametrize("name", RECIPES)
def test_published_values(repo, name):
    base, vae, pixels, rate, large, method, beta, mu = RECIPES[name]
    config = recipe(repo, name)
    model, optim = config.model, config.optim
    assert (model.pretrained_model_name_or_path, model.sdxl) == (base, large)
    assert model.pretrained_vae_model_name_or_path == vae
    assert (config.data.resolution, optim.learning_rate, optim.scale_lr) == (pixels, rate, True)
    assert (optim.use_adafactor, optim.gradient_checkpointing) == (large, large)
    assert (config.method.train_method, config.method.beta_dpo) == (method, beta)
    assert config.method.dmpo_alpha == 0.01
    guard = config.safeguard
    assert (guard.use_winner_preserving, guard.winner_preserving_mu) == (True, mu)
    assert (guard.winner_preserving_scope, guard.winner_preserving_space) == ("batch", "output")
    assert (optim.train_batch_size, optim.gradient_accumulation_steps) == (8, 32)
    assert (optim.max_train_steps, optim.num_train_epochs) == (2000, None)
    assert (optim.lr_scheduler, optim.lr_warmup_steps) == ("constant_with_warmup", 500)
    assert (optim.adam_weight_decay, optim.max_grad_norm) == (0.01, 1.0)
    assert (optim.mixed_precision, optim.allow_tf32) == ("bf16", True)
    data = config.data
    assert (data.dataset_name, data.split) == ("yuvalkirstain/pickapic_v2", "train")
    assert (data.proportion_empty_prompts, data.random_crop, data.no_hflip) == (0.2, False, False)
    assert config.run.checkpointing_steps == 500


@pytest.mark.parametrize("name", STARTS)
def test_starting_values(repo, name):
    base, pixels, rank, beta = STARTS[name]
    config = recipe(repo, name)
    assert config.model.pretrained_model_name_or_path == base
    assert (config.data.resolution, config.model.lora_rank) == (pixels, rank)
    assert (config.method.train_method, config.method.beta_dpo) == ("diffusion-dpo", beta)
    guard = config.safeguard
    assert (guard.use_winner_preserving, guard.winner_preserving_scope) == (True, "pair")
    assert (config.optim.mixed_precision, config.optim.gradient_checkpointing) == ("bf16", True)
    assert config.optim.scale_lr is not bool(rank)
    text = (repo / "scripts" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "not validated" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_keeps_its_values_as_json(repo, name):
    config = recipe(repo, name)
    kept = json.loads(json.dumps(config.flags()))
    assert TrainConfig.from_flags(kept) == config
    assert kept["lora_target_modules"] is None
    assert kept["validation_prompts"] == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_stands_in_its_section(repo, name):
    text = (repo / "scripts" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    assert list(written) == [section.name for section in fields(TrainConfig)]
    config = recipe(repo, name)
    for section, values in written.items():
        for flag, value in values.items():
            # PyYAML takes 1e-8 for text.
            found = getattr(getattr(config, section), flag)
            assert found == (float(value) if isinstance(found, float) else value), flag


def test_all_recipes_are_listed_here(repo):
    folder = repo / "scripts" / "recipes"
    assert {path.stem for path in folder.iterdir()} == {*RECIPES, *STARTS}
    scripts = (repo / "scripts" / "train").glob("[!_]*.sh")
    assert {path.stem for path in scripts} == {*RECIPES, *STARTS}


def test_flags_win_over_a_recipe(repo, tmp_path):
    argv = ["--no-use_winner_preserving", "--train_data_dir", "pairs", "--num_train_epochs", "1"]
    config = recipe(repo, "sdxl_dmpo", *argv, "--no-use_adafactor", "--beta_dpo", "7")
    assert not config.safeguard.use_winner_preserving
    assert (config.data.dataset_name, config.data.train_data_dir) == (None, "pairs")
    assert (config.optim.num_train_epochs, config.optim.max_train_steps) == (1, None)
    assert not config.optim.use_adafactor
    assert config.method.beta_dpo == 7
    # A file of one's own changes what it names, and flags win over it too.
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"beta_dpo": 8, "optim": {"max_train_steps": 3}}))
    layered = recipe(repo, "sdxl_dmpo", "--config_file", str(own), "--max_train_steps", "4")
    assert layered.method.beta_dpo == 8
    assert layered.optim.max_train_steps == 4
    assert layered.method.train_method == "dmpo"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("beta: 3", "there is no flag beta here"),
        ("optim: {beta_dpo: 3}", "there is no flag beta_dpo here"),
        ("optim: 3", "optim is a section"),
        ("method: {beta_dpo: {much: 3}}", "beta_dpo must be a value"),
        ("method: {beta_dpo: much}", "argument --beta_dpo: invalid float value: 'much'"),
        ("beta_dpo: 1\nbeta_dpo: 2", "beta_dpo is given twice"),
        ("[1]", "must hold names and values"),
        ("{", "cannot read"),
        (None, "there is no file"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as refused:
        parse_train(["--config_file", str(file)])
    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert str(refused.value).startswith("--config_file")

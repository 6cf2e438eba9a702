"""What PixArt-Sigma has of its own: noise under a schedule of betas, a variance beside it, a class
that had another name."""

from __future__ import annotations

import json

import pytest
import torch
from micro_bases import save_base

from sdpo.common.errors import UserError
from sdpo.models import get_family, open_base
from sdpo.models.base import ModelSource
from sdpo.models.noise import Diffusion


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "pixart-sigma"
    save_base("pixart-sigma", path)
    return path


def changed(path, file, **changes):
    """Change a file of a base."""
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({**content, **changes}))


@pytest.fixture
def copy(base, tmp_path):
    import shutil

    return shutil.copytree(base, tmp_path / "base")


def test_a_run_takes_it_for_what_it_is(make_config, base):
    config = make_config(pretrained_model_name_or_path=base, resolution=None)
    assert (config.safeguard.scope, config.data.resolution) == ("batch", 64)
    family, source = open_base(config)
    process = family.process(family.load_scheduler(source), (4, 16, 16))
    assert isinstance(process, Diffusion)
    clean, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(process.target(clean, noise, torch.tensor([500])), noise)
    for flags, said in (
        ({"time_shift": 2.0}, "--time_shift is of rectified flow; PixArt-Sigma is trained at"),
        ({"lora_rank": 2}, "--lora_rank: diffusers reads no LoRA of PixArt-Sigma: leave it out"),
        ({"resolution": 40}, "a multiple of 16 with a base of PixArt-Sigma"),
    ):
        with pytest.raises(UserError, match=said):
            make_config(pretrained_model_name_or_path=base, **flags)


def test_the_published_files_name_another_class(make_config, copy):
    changed(copy, "transformer/config.json", _class_name="Transformer2DModel")
    family, source = open_base(make_config(pretrained_model_name_or_path=copy))
    assert family.name == "pixart-sigma"
    assert type(family.load_unet(source)).__name__ == "PixArtTransformer2DModel"


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "PixArtAlphaPipeline"},
         "of a PixArtAlphaPipeline, .* a base of PixArtSigmaPipeline is needed"),
        ("transformer/config.json", {"use_additional_conditions": True},
         "use_additional_conditions is True, so the model must be told more"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"},
         "no discrete schedule of betas"),
        ("vae/config.json", {"latent_channels": 16}, "16 latent_channels.* takes 4"),
    ],
)  # fmt: skip
def test_what_is_not_served(make_config, copy, file, changes, said):
    changed(copy, file, **changes)
    with pytest.raises(UserError, match=said):
        make_config(pretrained_model_name_or_path=copy)


def test_a_start_that_must_be_told_more(make_config, base, copy):
    changed(copy, "transformer/config.json", use_additional_conditions=True)
    with pytest.raises(UserError, match=r"--unet_init: .*use_additional_conditions is True"):
        make_config(pretrained_model_name_or_path=base, unet_init=copy / "transformer")


def test_a_tokenizer_that_another_package_reads(make_config, copy, monkeypatch):
    """As the published base has it."""
    (copy / "tokenizer/tokenizer.json").rename(copy / "tokenizer/spiece.model")
    monkeypatch.setattr("sdpo.models.locations.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"spiece.model alone, .* pip install sentencepiece"):
        make_config(pretrained_model_name_or_path=copy)


def test_its_vae_overflows_in_float16(base):
    family = get_family("pixart-sigma")
    vae = family.load_frozen(ModelSource(str(base))).vae
    assert family.vae_dtype(vae, torch.float16) == torch.float32
    assert family.vae_dtype(vae, torch.bfloat16) == torch.bfloat16

"""Bases of other kinds are refused by their configuration files, at the start; what is like the
families' own, or only lacks what can be known, works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.config import ModelConfig
from sdpo.config.families import FAMILIES
from sdpo.evaluation.generate.config import GenerationConfig, fill_in
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.checks import check_pipeline
from sdpo.models.locations import check_model_location
from sdpo.models.text import fit_tokenizer

SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
TEXT, TEXT_2 = "text_encoder/config.json", "text_encoder_2/config.json"
FLAG = "--pretrained_model_name_or_path"


@pytest.fixture
def copy(tiny_sd15, tiny_sdxl, tmp_path):
    """`copy(sdxl)`: a copy of a micro pipeline; `copy(sdxl, file, {...})` with values of one file
    changed, or taken out where they are DROP."""

    def make(sdxl=False, file=None, changes=None):
        path = tmp_path / "base"
        shutil.copytree(tiny_sdxl if sdxl else tiny_sd15, path)
        if file:
            config = {**json.loads((path / file).read_text()), **changes}
            kept = {k: v for k, v in config.items() if v != DROP}
            (path / file).write_text(json.dumps(kept))
        return path

    return make


DROP = "(taken out)"


def check(path, sdxl=False, **more):
    check_model_location(ModelConfig(pretrained_model_name_or_path=str(path), sdxl=sdxl, **more))


def refusal(path, sdxl=False):
    """The sentence of the check before torch, after that of evaluation and that of hub ids, which
    must say the same."""
    with pytest.raises(UserError) as caught:
        check(path, sdxl)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    generation = GenerationConfig(
        unet="base", sdxl=sdxl, pretrained_model_name_or_path=str(path),
        pretrained_vae_model_name_or_path="base", outdir=path.parent / "out",
    )  # fmt: skip
    with pytest.raises(UserError) as again:
        fill_in(generation)
    assert str(again.value) == message
    with pytest.raises(UserError):
        get_family("sdxl" if sdxl else "sd15").check(ModelSource(str(path)))
    return message


PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}
REFUSED = [
    (False, SCHEDULER, PLAYGROUND, "EDMDPMSolverMultistepScheduler has no discrete schedule"),
    (True, SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler has no discrete"),
    (False, SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    (False, SCHEDULER, {"_class_name": "IPNDMScheduler"}, "IPNDMScheduler has no discrete"),
    (False, SCHEDULER, {"_class_name": "MyOwnScheduler"}, "MyOwnScheduler has no discrete"),
    (False, SCHEDULER, {"_class_name": DROP}, "a scheduler without _class_name"),
    (True, SCHEDULER, {"prediction_type": "sample"}, "predicts sample; .*epsilon"),
    (False, SCHEDULER, {"prediction_type": "flow_prediction"}, "predicts flow_prediction"),
    (False, SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
    (True, SCHEDULER, {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    (False, SCHEDULER, {"beta_schedule": "mine"}, "beta_schedule is 'mine'"),
    (False, SCHEDULER, {"beta_start": DROP}, "beta_start is None"),
    (False, SCHEDULER, {"beta_end": "0.012"}, "beta_end is '0.012'"),
    (False, SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    (False, SCHEDULER, {"trained_betas": [0.1] * 7}, r"trained_betas must be .*\(1000\) numbers"),
    (False, UNET, {"in_channels": 9}, "9 in_channels and 4 out_channels.*inpainting"),
    (True, UNET, {"in_channels": 8}, "8 in_channels and 4 out_channels"),
    (False, UNET, {"out_channels": 8}, "4 in_channels and 8 out_channels"),
    (False, UNET, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    (False, UNET, {"num_class_embeds": 1000}, "num_class_embeds is 1000"),
    (False, UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
    (False, UNET, {"addition_embed_type": "text"}, "addition_embed_type is 'text'"),
    (True, UNET, {"addition_embed_type": "image_hint"}, "addition_embed_type is 'image_hint'"),
    (False, UNET, {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type 'image_proj'"),
    (False, UNET, {"_class_name": "UNetMotionModel"}, "is of a UNetMotionModel"),
    (False, UNET, {"cross_attention_dim": 24}, "cross_attention_dim 24, but .*text_encoder 16"),
    (True, UNET, {"projection_class_embeddings_input_dim": 36}, "refiner"),
    (False, VAE, {"latent_channels": 16}, "16 latent_channels, but the UNet takes 4"),
    (True, VAE, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents_mean normalises"),
    (False, VAE, {"latents_std": [1.0] * 4}, "latents_std normalises"),
    (False, VAE, {"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny"),
    (False, VAE, {"in_channels": 1}, "images of 1 channels"),
    (False, VAE, {"scaling_factor": 0}, "scaling_factor is 0"),
    (False, TEXT, {"model_type": "t5"}, "is of a t5; CLIP's is needed"),
    (False, TEXT, {"hidden_size": 32}, "cross_attention_dim 16, but .*text_encoder 32"),
    (True, TEXT_2, {"hidden_size": 32}, r"text_encoder 16 \+ text_encoder_2 32"),
    (True, TEXT_2, {"projection_dim": 8}, "projection_dim 8"),
]


@pytest.mark.parametrize(("sdxl", "file", "changes", "said"), REFUSED)
def test_another_kind_of_base_is_refused(copy, sdxl, file, changes, said):
    message = refusal(copy(sdxl, file, changes), sdxl)
    assert re.search(said, message), message
    assert message.startswith(FLAG) or "holds a UNet of another kind" in message


@pytest.mark.parametrize("sdxl", [False, True])
def test_the_tiny_bases_pass(copy, sdxl):
    path = copy(sdxl)
    check(path, sdxl)
    get_family("sdxl" if sdxl else "sd15").check(ModelSource(str(path)))


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("file", [SCHEDULER, VAE, TEXT])
def test_a_part_that_is_missing_is_named(copy, sdxl, file):
    path = copy(sdxl)
    (path / file).unlink()
    assert f"has no {file}" in refusal(path, sdxl)


@pytest.mark.parametrize("file", ["model_index.json", SCHEDULER, VAE, UNET, TEXT])
@pytest.mark.parametrize("content", ["[1]", "{", "3"])
def test_a_file_that_is_no_json_object_is_named(copy, file, content):
    path = copy()
    (path / file).write_text(content)
    with pytest.raises(UserError, match=file):
        check(path)


def test_a_tokenizer_without_vocabulary_is_refused(copy):
    path = copy()
    for name in ("tokenizer.json", "vocab.json"):
        (path / "tokenizer" / name).unlink(missing_ok=True)  # a slow tokenizer has the second alone
    with pytest.raises(UserError, match=r"tokenizer has neither tokenizer\.json nor vocab\.json"):
        check(path)
    # What a hub id leads to: the library makes a tokenizer of its special tokens, without a word.
    with pytest.raises(UserError, match="tokenizer"):
        get_family("sd15").load_frozen(ModelSource(str(path)))


def test_a_tokenizer_that_is_larger_than_its_encoder_is_refused(tiny_sd15):
    frozen = get_family("sd15").load_frozen(ModelSource(str(tiny_sd15)))
    (tokenizer,), config = frozen.tokenizers, frozen.text_encoders[0].config
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match=r"^here: its tokenizer has \d+ tokens, but"):
        fit_tokenizer(tokenizer, config, "here")


@pytest.mark.parametrize("sdxl", [False, True])
def test_without_model_max_length_the_text_encoder_says_it(copy, tiny_sd15, tiny_sdxl, sdxl):
    path = copy(sdxl, "tokenizer/tokenizer_config.json", {"model_max_length": DROP})
    check(path, sdxl)
    family = get_family("sdxl" if sdxl else "sd15")
    captions = ["a red square", "word " * 60]
    plain = ModelSource(str(tiny_sdxl if sdxl else tiny_sd15))
    want = family.encode_text(family.load_frozen(plain), captions)
    found = family.encode_text(family.load_frozen(ModelSource(str(path))), captions)
    assert found["hidden"].shape[1] == 24
    assert all(torch.equal(value, want[name]) for name, value in found.items())


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_base_without_model_index_is_trained_and_exported(copy, sdxl, tmp_path):
    path = copy(sdxl)
    (path / "model_index.json").unlink()
    check(path, sdxl)
    family, source = get_family("sdxl" if sdxl else "sd15"), ModelSource(str(path))
    family.check(source)
    pipeline = family.pipeline(family.load_unet(source), family.load_frozen(source), source)
    pipeline.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/model_index.json").is_file()


def test_trained_betas_are_what_is_trained_on(copy):
    betas = torch.linspace(0.001, 0.03, 1000)
    path = copy(True, SCHEDULER, {"trained_betas": betas.tolist()})
    check(path, True)
    family, source = get_family("sdxl"), ModelSource(str(path))
    family.check(source)
    trained = family.load_scheduler(source).alphas_cumprod
    torch.testing.assert_close(trained, (1 - betas).cumprod(0))


def test_a_rescaled_schedule_is_what_is_trained_on(copy):
    path = copy(True, SCHEDULER, {"rescale_betas_zero_snr": True})
    family, source = get_family("sdxl"), ModelSource(str(path))
    family.check(source)
    trained = family.load_scheduler(source).alphas_cumprod
    root = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0).sqrt()
    want = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(trained, want, rtol=1e-3, atol=1e-6)


def test_settings_that_the_bases_own_scheduler_does_not_know_are_refused(copy):
    """PNDM has no rescale_betas_zero_snr, DDPM has."""
    source = ModelSource(str(copy(False, SCHEDULER, {"rescale_betas_zero_snr": True})))
    with pytest.raises(UserError, match="PNDMScheduler makes another schedule"):
        get_family("sd15").check(source)


def test_a_pipeline_by_its_older_name():
    for name in ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"):
        check_pipeline({"_class_name": name}, FAMILIES["lumina-2"], "base")
    with pytest.raises(UserError, match=r"^base is of a LuminaPipeline, .* of Lumina2Pipeline is"):
        check_pipeline({"_class_name": "LuminaPipeline"}, FAMILIES["lumina-2"], "base")


@pytest.mark.parametrize("changes", [{"latent_channels": 16}, {"latents_mean": [0.0] * 4}])
def test_another_vae_is_checked_too(copy, tiny_sd15, changes):
    vae = copy(False, VAE, changes) / "vae"
    with pytest.raises(UserError, match=f"^--pretrained_vae_model_name_or_path: {vae}/config.json"):
        check(tiny_sd15, pretrained_vae_model_name_or_path=str(vae))


@pytest.mark.parametrize(
    "changes", [{"cross_attention_dim": 32}, {"in_channels": 9}, {"num_class_embeds": 3}]
)
def test_a_unet_to_start_from_is_checked_too(copy, tiny_sd15, changes):
    init = copy(False, UNET, changes) / "unet"
    (name,) = changes
    with pytest.raises(UserError, match=f"^--unet_init: {init}/config.json: .*{name}"):
        check(tiny_sd15, unet_init=str(init))


def test_the_checks_come_before_torch(copy, pairs_dir, repo):
    """train.py --check_only ends with one sentence, and torch is never imported."""
    path = copy(False, SCHEDULER, PLAYGROUND)
    code = (
        "import sys; from sdpo.common.errors import UserError; import train; sys.argv = "
        f"['train.py', '{FLAG}', {str(path)!r}, '--train_data_dir', {str(pairs_dir)!r}, "
        f"'--output_dir', {str(path.parent / 'run')!r}, '--max_train_steps', '1']\n"
        "try: train.main()\n"
        "except UserError as e: sys.exit('torch' in sys.modules or 'EDM' not in str(e))\n"
        "sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0

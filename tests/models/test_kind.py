"""What a run leaves to its base is read from the base's own files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.models import get_family, open_base
from sdpo.models.base import ModelSource
from sdpo.models.noise import Times


def test_the_family_needs_no_flag(make_config, tiny_sd15, tiny_sdxl, tiny_sd3):
    for name, path in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl), ("sd3", tiny_sd3)):
        config = make_config(pretrained_model_name_or_path=path)
        assert open_base(config).family.name == name


def test_sdxl_is_a_check(make_config, tiny_sd15, tiny_sd3):
    for path in (tiny_sd15, tiny_sd3):
        with pytest.raises(UserError, match="leave --sdxl out"):
            make_config(pretrained_model_name_or_path=path, sdxl=True)


def test_the_scope_is_pair_where_noise_is_not_predicted(make_config, tiny_sd3, tiny_v):
    def scope(**flags):
        return make_config(**flags).safeguard.winner_preserving_scope

    assert scope() == "batch"
    assert scope(pretrained_model_name_or_path=tiny_sd3) == "pair"
    assert scope(pretrained_model_name_or_path=tiny_v) == "pair"
    flags = {"pretrained_model_name_or_path": tiny_sd3, "winner_preserving_scope": "batch"}
    assert scope(**flags) == "batch"


def test_the_resolution_is_the_bases_own(make_config, tiny_sd3):
    """16 latents a side, of a VAE that halves twice."""
    assert make_config(resolution=None).data.resolution == 64
    config = make_config(pretrained_model_name_or_path=tiny_sd3, resolution=None)
    assert config.data.resolution == 64
    with pytest.raises(UserError, match="--resolution must be a multiple of 16 with a base of SD3"):
        make_config(pretrained_model_name_or_path=tiny_sd3, resolution=40)


def test_buckets_have_sides_that_the_base_takes(make_config, tiny_sd3):
    flags = {"pretrained_model_name_or_path": tiny_sd3, "resize": "bucket"}
    assert make_config(**flags, resolution=128).data.resize == "bucket"
    for resolution in (64, None):
        with pytest.raises(UserError, match=r"sides are multiples of 8, .* give --resolution 128 "):
            make_config(**flags, resolution=resolution)


def test_adapters_go_to_the_familys_layers(make_config, tiny_sd3):
    plain = make_config(lora_rank=2).model.lora_target_modules
    joint = make_config(pretrained_model_name_or_path=tiny_sd3, lora_rank=2)
    assert plain == ("to_q", "to_k", "to_v", "to_out.0")
    assert "add_k_proj" in joint.model.lora_target_modules


def test_flags_of_time(make_config, tiny_sd3):
    flags = {"time_mean": -0.5, "time_std": 0.7, "time_shift": 2.0}
    family, source = open_base(make_config(pretrained_model_name_or_path=tiny_sd3, **flags))
    process = family.process(family.load_scheduler(source), (4, 16, 16))
    assert (process.shift, process.how) == (2.0, Times("logit-normal", -0.5, 0.7, 2.0))
    uniform = make_config(pretrained_model_name_or_path=tiny_sd3, time_sampling="uniform")
    assert open_base(uniform).family.times.sampling == "uniform"
    for name, value in {**flags, "time_sampling": "uniform"}.items():
        with pytest.raises(UserError, match=f"--{name} is of rectified flow"):
            make_config(**{name: value})
    with pytest.raises(UserError, match="--time_mean has no meaning with --time_sampling uniform"):
        make_config(pretrained_model_name_or_path=tiny_sd3, time_sampling="uniform", time_mean=1.0)


def test_velocity_is_trained_on(tiny_v):
    family, source = get_family("sdxl"), ModelSource(str(tiny_v))
    family.check(source)
    schedule = family.load_scheduler(source)
    assert schedule.alphas_cumprod[-1] < 1e-6
    process = family.process(schedule, (4, 16, 16))
    clean, noise = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    last = torch.tensor([999])
    torch.testing.assert_close(process.target(clean, noise, last), -clean, rtol=1e-2, atol=1e-2)


def test_a_single_file_that_predicts_v_needs_a_base_that_does(tiny_sdxl, tiny_v, tmp_path):
    from safetensors.torch import save_file

    unet = get_family("sdxl").load_unet(ModelSource(str(tiny_sdxl)))
    file = tmp_path / "unet.safetensors"
    save_file({**unet.state_dict(), "v_pred": torch.empty(0)}, file)
    with pytest.raises(UserError, match=r"predicts v .*but the scheduler"):
        get_family("sdxl").load_unet(ModelSource(str(tiny_sdxl), unet_init=str(file)))


def test_an_unknown_denoiser_is_one_sentence(make_config, tiny_sd3, tmp_path):
    path = tmp_path / "base"
    shutil.copytree(tiny_sd3, path)
    file = path / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "HunyuanDiT2D"}))
    with pytest.raises(UserError, match="of a HunyuanDiT2D; served are UNet2DConditionModel, SD3"):
        make_config(pretrained_model_name_or_path=path)

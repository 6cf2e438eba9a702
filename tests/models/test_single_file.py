"""Single-file checkpoints in the original layout: written, read by diffusers, read by us."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from sdpo.common.errors import UserError
from sdpo.models import get_family, open_base
from sdpo.models.base import ModelSource
from sdpo.models.kind import place_of_base
from sdpo.models.original import text_states, unet_state, vae_state


def parts_of(family, source):
    """{name: module} of all that has weights."""
    frozen = family.load_frozen(source)
    names = ("text_encoder", "text_encoder_2")
    encoders = dict(zip(names, frozen.text_encoders, strict=False))
    return {"unet": family.load_unet(source), "vae": frozen.vae, **encoders}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, tiny_sd15, tiny_sdxl, tmp_path_factory):
    """(family, directory in diffusers layout, its parts, their state dict in one)."""
    family = get_family(request.param)
    directory = tiny_sdxl if family.sdxl else tiny_sd15
    parts = parts_of(family, ModelSource(str(directory)))
    encoders = [m.state_dict() for name, m in parts.items() if name.startswith("text")]
    state = {
        **unet_state(parts["unet"].state_dict(), parts["unet"].config),
        **vae_state(parts["vae"].state_dict(), parts["vae"].config),
        **text_states(encoders),
    }
    return family, directory, parts, {k: v.contiguous() for k, v in state.items()}


def source(path, directory, sdxl):
    place, weights = place_of_base(str(path), str(directory), sdxl)
    return ModelSource(place, weights=weights)


def test_diffusers_reads_what_is_written(base, tmp_path):
    """Of SDXL's encoders the first: the second is told by its width, equal in the tiny model."""
    family, directory, parts, state = base
    save_file(state, tmp_path / "all.safetensors")
    kind = "StableDiffusionXLPipeline" if family.sdxl else "StableDiffusionPipeline"
    more = {} if family.sdxl else {"safety_checker": None}
    pipeline = getattr(diffusers, kind).from_single_file(
        tmp_path / "all.safetensors", config=str(directory), **more
    )
    for name in ("unet", "vae", "text_encoder"):
        want, found = parts[name].state_dict(), getattr(pipeline, name).state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], want[k]) for k in want)


@pytest.mark.parametrize("kind", ["all.safetensors", "all.ckpt"])
def test_a_base_of_one_file_is_that_of_the_directory(base, tmp_path, kind):
    family, directory, parts, state = base
    path = tmp_path / kind
    beside = {
        **state,
        "model_ema.decay": torch.tensor(0.9),
        "first_stage_model.loss.x": state[min(state)],
    }
    if kind.endswith("ckpt"):
        torch.save({"state_dict": beside, "global_step": 7}, path)
    else:
        save_file({k: v.clone() for k, v in beside.items()}, path)
    for name, module in parts_of(family, source(path, directory, family.sdxl)).items():
        want, found = parts[name].state_dict(), module.state_dict()
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], want[k]) for k in want), name


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_unet_of_a_single_file(base, tmp_path, prefix):
    family, directory, parts, state = base
    start = "model.diffusion_model."
    own = {prefix + k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    save_file(own, tmp_path / "unet.safetensors")
    unet = family.load_unet(
        ModelSource(str(directory), unet_init=str(tmp_path / "unet.safetensors"))
    )
    want = parts["unet"].state_dict()
    assert all(torch.equal(v, want[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "middle_block.1" not in k},
            "no place in an .*; is the file whole",
        ),
        (
            lambda s: {**s, "model.diffusion_model.odd.weight": torch.ones(1)},
            "1 of its .* no place",
        ),
        (lambda s: {**s, "v_pred": torch.ones(1)}, "predicts v"),
        (lambda s: {k: v for k, v in s.items() if "first_stage" not in k}, "its vae is not in the"),
        (
            lambda s: {k: v for k, v in s.items() if "mid.attn_1.q." not in k},
            "its vae does not fit",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "layers.0.mlp.fc1" not in k},
            "its text_encoder does not fit",
        ),
    ],
)
def test_what_is_not_whole_is_refused(base, tmp_path, change, said):
    family, directory, _, state = base
    save_file({k: v.clone() for k, v in change(state).items()}, tmp_path / "a.safetensors")
    place = source(tmp_path / "a.safetensors", directory, family.sdxl)
    with pytest.raises(UserError, match=said) as caught:
        parts_of(family, place)
    assert str(caught.value).startswith("--pretrained_model_name_or_path")
    assert "\n" not in str(caught.value)


def test_the_other_family_is_refused(base, tmp_path, tiny_sd15, tiny_sdxl):
    family, _, _, state = base
    save_file(state, tmp_path / "a.safetensors")
    other = tiny_sd15 if family.sdxl else tiny_sdxl
    advice = "add --sdxl" if family.sdxl else "leave --sdxl out"
    with pytest.raises(UserError, match=f"UNet: {advice}"):
        get_family("sd15" if family.sdxl else "sdxl").load_unet(
            source(tmp_path / "a.safetensors", other, not family.sdxl)
        )


def test_without_configurations_it_is_said_which(base, tmp_path):
    family, _, _, state = base
    save_file(state, tmp_path / "a.safetensors")
    place, weights = place_of_base(str(tmp_path / "a.safetensors"), None, family.sdxl)
    with pytest.raises(
        UserError, match=f"tokenizers of {place} cannot be had; give --single_file_config"
    ):
        family.load_unet(ModelSource(place, weights=weights))


def test_flags(make_config, tiny_sd15, tiny_sdxl, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x")
    found = make_config(pretrained_model_name_or_path=file, single_file_config=tiny_sd15)
    model = ModelSource.of(found)
    assert (model.base, model.weights) == (str(tiny_sd15), str(file))
    with pytest.raises(UserError, match="--single_file_config has no meaning unless"):
        make_config(single_file_config=tiny_sd15)
    with pytest.raises(UserError, match="leave --sdxl out"):
        make_config(pretrained_model_name_or_path=file, single_file_config=tiny_sd15, sdxl=True)
    larger = make_config(pretrained_model_name_or_path=file, single_file_config=tiny_sdxl)
    assert open_base(larger).family.sdxl
    with pytest.raises(UserError, match=r"--single_file_config: there is no directory \./nowhere"):
        make_config(pretrained_model_name_or_path=file, single_file_config="./nowhere")

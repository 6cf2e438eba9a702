"""Starting weights from every kind of place, and what is refused."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdpo.common.errors import UserError
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.loading import is_weights_file, load_strictly, read_state_dict


@pytest.fixture(scope="module")
def trained(tiny_sd15):
    """An SD1.5 UNet unlike the base's."""
    unet = get_family("sd15").load_unet(ModelSource(str(tiny_sd15)))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.125)
    return unet


def start(tiny, init, sdxl=False):
    return get_family("sdxl" if sdxl else "sd15").load_unet(
        ModelSource(str(tiny), unet_init=str(init))
    )


def save_as(unet, kind, directory):
    """Save a UNet in one of the forms --unet_init takes; the path to give."""
    if kind in ("unet.pth", "unet.pt", "unet.bin"):
        torch.save(unet.state_dict(), directory / kind)
        return directory / kind
    if kind == "unet.safetensors":
        save_file(unet.state_dict(), directory / kind)
        return directory / kind
    unet.save_pretrained(directory / ("unet" if kind == "pipeline" else "plain"))
    return directory if kind == "pipeline" else directory / "plain"


@pytest.mark.parametrize(
    "kind", ["unet.pth", "unet.pt", "unet.bin", "unet.safetensors", "unet dir", "pipeline"]
)
def test_unet_init(kind, trained, tiny_sd15, tmp_path):
    unet = start(tiny_sd15, save_as(trained, kind, tmp_path))
    want = trained.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in unet.state_dict().items())
    assert all(p.dtype == torch.float32 for p in unet.parameters())
    base = get_family("sd15").load_unet(ModelSource(str(tiny_sd15)))
    assert not torch.equal(base.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize("kind", ["unet.pth", "unet.safetensors"])
def test_half_precision_weights_become_float32(kind, trained, tiny_sd15, tmp_path):
    state = {k: v.half() for k, v in trained.state_dict().items()}
    path = tmp_path / kind
    save_file(state, path) if kind.endswith("tensors") else torch.save(state, path)
    unet = start(tiny_sd15, path)
    assert unet.conv_in.weight.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, state["conv_in.weight"].float())


@pytest.mark.parametrize("kind", ["unet.pth", "unet.safetensors", "unet dir", "pipeline"])
def test_another_family_is_refused(kind, trained, tiny_sdxl, tmp_path):
    with pytest.raises(UserError, match=r"^--unet_init .*(family|SD1\.5 UNet)") as caught:
        start(tiny_sdxl, save_as(trained, kind, tmp_path), sdxl=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["unet.pth", "unet.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_sentence(kind, share, trained, tiny_sd15, tmp_path):
    path = save_as(trained, kind, tmp_path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError) as caught:
        start(tiny_sd15, path)
    assert str(caught.value).startswith(f"cannot read UNet weights from {path}: ")
    assert "\n" not in str(caught.value)


class Harmful:
    """Its unpickling would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(suffix, zipped, tiny_sd15, tmp_path):
    witness, path = tmp_path / "was run", tmp_path / f"bad{suffix}"
    if zipped:
        torch.save({"conv_in.weight": Harmful(witness)}, path)
    else:
        path.write_bytes(pickle.dumps({"conv_in.weight": Harmful(witness)}))
    with pytest.raises(UserError) as caught:
        start(tiny_sd15, path)
    assert not witness.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {"state_dict": {"a": 1}}])
def test_what_is_no_plain_state_dict_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match="not a plain state dict"):
        read_state_dict(tmp_path / "x.pth")


def test_a_missing_file_is_refused(tmp_path):
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(UserError, match="cannot read UNet weights"):
            read_state_dict(tmp_path / f"gone{suffix}")


def test_names_and_shapes_must_all_fit():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = {k: torch.ones_like(v) for k, v in before.items()}
    bad = {
        r"1 of 4 weights are missing \(e\.g\. 1\.bias\)": {
            k: v for k, v in good.items() if k != "1.bias"
        },
        r"1 of 4 weights are unknown \(e\.g\. extra\)": {**good, "extra": torch.ones(1)},
        r"2 of 4 weights are of another shape \(e\.g\. 0\.bias\)": {
            **good,
            "0.bias": torch.ones(4),
            "0.weight": torch.ones(3, 3),
        },
    }
    for message, state in bad.items():
        with pytest.raises(UserError, match=f"^here does not fit this UNet: {message}"):
            load_strictly(model, state, "here")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_strictly(model, good, "here")
    assert all((v == 1).all() for v in model.state_dict().values())


def test_is_weights_file():
    assert all(is_weights_file(f"a/b{s}") for s in (".pth", ".pt", ".bin", ".safetensors"))
    assert not any(is_weights_file(name) for name in ("owner/name", "dir", "owner/name-1.5"))


WRAPPED = [
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model": {"state_dict": s}},
    lambda s: {"module": s},
    lambda s: {"unet": s, "optimizer": {"step": 1}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    lambda s: {"model": {f"module._orig_mod.unet.{k}": v for k, v in s.items()}},
    lambda s: {k.replace(".resnets.", "._orig_mod.resnets."): v for k, v in s.items()},
    lambda s: {f"unet.{k}": v for k, v in s.items()} | {"text_encoder.x": torch.zeros(1)},
]


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_prefixes_and_the_old_format(trained, tiny_sd15, tmp_path, wrap, zipped):
    path = tmp_path / "unet.ckpt"
    torch.save(wrap(trained.state_dict()), path, _use_new_zipfile_serialization=zipped)
    unet = start(tiny_sd15, path)
    want = trained.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in unet.state_dict().items())


def test_a_wrapper_is_told_where_there_is_one(tmp_path, caplog):
    caplog.set_level("INFO")
    state = {"x": torch.zeros(1)}
    said = {"": state, "model.module": {"model": {"module": state}}, "unet": {"unet": state}}
    for keys, content in said.items():
        caplog.clear()
        torch.save(content, tmp_path / "unet.pth")
        assert read_state_dict(tmp_path / "unet.pth").keys() == {"x"}
        assert caplog.text.count("lies under") == bool(keys)
        assert not keys or caplog.text.rstrip().endswith(f"lies under {keys}")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"unet.down_blocks.0.attn.to_q.lora_A.weight": 1}, "a file of adapters"),
        ({"lora_unet_down_blocks_0_attn_to_q.lora_down.weight": 1}, "a file of adapters"),
        ({"model.diffusion_model.input_blocks.0.0.weight": 1}, "weights are missing"),
    ],
)
def test_other_kinds_of_files_are_recognised(tiny_sd15, tmp_path, state, said):
    path = tmp_path / "other.safetensors"
    save_file({k: torch.zeros(v) for k, v in state.items()}, path)
    with pytest.raises(UserError, match=said):
        start(tiny_sd15, path)


def edited(base, tmp_path, part, file, change):
    """A copy of a base in which the state dict of one part's file is another."""
    path = tmp_path / "base"
    shutil.copytree(base, path)
    state = change(load_file(path / part / file))
    save_file(state, path / part / file, metadata={"format": "pt"})
    return ModelSource(str(path))


UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"


@pytest.mark.parametrize(
    ("part", "file", "drop"),
    [
        ("unet", UNET, "mid_block"),
        ("vae", UNET, "mid_block"),
        ("vae", UNET, "conv_in.bias"),
        ("text_encoder", TEXT, "layers.0."),
        ("text_encoder", TEXT, "final_layer_norm.weight"),
    ],
)
def test_a_base_that_lacks_weights_is_refused(tiny_sd15, tmp_path, part, file, drop):
    family = get_family("sd15")
    source = edited(
        tiny_sd15, tmp_path, part, file, lambda s: {k: v for k, v in s.items() if drop not in k}
    )
    with pytest.raises(UserError) as caught:
        family.load_unet(source) if part == "unet" else family.load_frozen(source)
    message = str(caught.value)
    assert message.startswith(f"--pretrained_model_name_or_path: {part} from ")
    assert "are missing (e.g. " in message
    assert "\n" not in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_with_unknown_weights_is_refused(tiny_sd15, tmp_path, part):
    family, file = get_family("sd15"), TEXT if part == "text_encoder" else UNET
    more = {"extra.weight": torch.zeros(2)}
    source = edited(tiny_sd15, tmp_path, part, file, lambda s: {**s, **more})
    with pytest.raises(UserError, match=rf"{part} from .*1 unknown \(e.g. extra.weight\)"):
        family.load_unet(source) if part == "unet" else family.load_frozen(source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "cond_stage_model.transformer."])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_bases_prefixes_are_taken_off(tiny_sd15, tmp_path, part, prefix):
    family, file = get_family("sd15"), TEXT if part == "text_encoder" else UNET
    source = edited(
        tiny_sd15, tmp_path, part, file, lambda s: {f"{prefix}{k}": v for k, v in s.items()}
    )

    def loaded(source):
        if part == "unet":
            return family.load_unet(source)
        frozen = family.load_frozen(source)
        return frozen.vae if part == "vae" else frozen.text_encoders[0]

    want = loaded(ModelSource(str(tiny_sd15))).state_dict()
    found = loaded(source)
    assert not found.training
    assert all(torch.equal(v, want[k]) for k, v in found.state_dict().items())


def test_weights_of_the_variant_fp16_alone(tiny_sd15, tmp_path):
    path = tmp_path / "base"
    shutil.copytree(tiny_sd15, path)
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    family, source = get_family("sd15"), ModelSource(str(path))
    family.load_unet(source)
    family.load_frozen(source)
    start(tiny_sd15, path)

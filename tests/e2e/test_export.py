"""`python -m sdpo.training.export`: what other programs read of a run."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from sdpo.common.errors import UserError
from sdpo.models import get_family
from sdpo.models.base import ModelSource

from .harness import base_unet, files, identical, run_here

PROGRAM = "sdpo/training/export.py"
LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "max_train_steps": 2}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(train, kind, tmp_path_factory):
    """A run with adapters of either family, two checkpoints."""
    flags = {**LORA, "checkpointing_steps": 1, "use_ema": True}
    return train(tmp_path_factory.mktemp("run"), **flags, sdxl=kind == "sdxl")


def from_single_file(kind, path, model):
    name = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    more = {} if kind == "sdxl" else {"safety_checker": None}
    return getattr(diffusers, name).from_single_file(path, config=str(model), **more)


def test_a_file_in_the_original_layout_comes_back_to_the_bit(run, kind, train, tmp_path):
    model, out = train.models[kind], tmp_path / "new" / "all.safetensors"
    assert run_here(PROGRAM, [run.out, "--out", out]) == 0
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert identical(from_single_file(kind, out, model).unet.state_dict(), run.unet())
    assert not identical(run.unet(), base_unet(model))
    family = get_family(kind)
    source = ModelSource(str(model), weights=str(out))
    want, found = family.load_frozen(ModelSource(str(model))), family.load_frozen(source)
    for a, b in zip(
        [want.vae, *want.text_encoders], [found.vae, *found.text_encoders], strict=True
    ):
        assert identical(a.state_dict(), b.state_dict())


def test_half_precision_of_a_checkpoint_and_the_average(run, kind, train, tmp_path, capsys):
    out = tmp_path / "half.safetensors"
    assert run_here(PROGRAM, [run.out / "checkpoint-1", "--out", out, "--half"]) == 0
    assert f"wrote {out}\n" in capsys.readouterr().out
    assert {v.dtype for v in load_file(out).values()} == {torch.float16}
    found = from_single_file(kind, out, train.models[kind]).unet.state_dict()
    assert identical(
        {k: v.half() for k, v in run.unet(1).items()}, {k: v.half() for k, v in found.items()}
    )
    assert run_here(PROGRAM, [run.out, "--out", out, "--ema", "--force"]) == 0
    ema = torch.load(run.out / "checkpoint-2" / "unet_ema.pth", weights_only=True)
    assert identical(from_single_file(kind, out, train.models[kind]).unet.state_dict(), ema)


@pytest.mark.usefixtures("diffusers_finds_files")
def test_adapters_in_kohyas_naming_do_the_same_in_diffusers(run, kind, train, tmp_path):
    out = tmp_path / "lora.safetensors"
    assert run_here(PROGRAM, [run.out, "--out", out, "--format", "lora_kohya"]) == 0
    state = load_file(out)
    assert all(name.startswith("lora_unet_") for name in state)
    assert {v.item() for k, v in state.items() if k.endswith(".alpha")} == {8.0}
    family, source = get_family(kind), ModelSource(str(train.models[kind]))
    pipeline = family.pipeline(family.load_unet(source), family.load_frozen(source), source)
    pipeline.load_lora_weights(out)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    found = pipeline.unet.state_dict()
    for name, value in run.unet().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_pipeline_of_a_checkpoint(run, tmp_path):
    argv = [run.out / "checkpoint-1", "--out", tmp_path / "p", "--format", "diffusers"]
    assert run_here(PROGRAM, argv) == 0
    assert identical(base_unet(tmp_path / "p"), run.unet(1))


def test_refusals_leave_everything_as_it_was(run, kind, train, tmp_path):
    if kind == "sdxl":
        pytest.skip("the same for either family")
    plain = train(tmp_path / "plain", max_train_steps=1)
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"x")
    (tmp_path / "d.safetensors").mkdir()
    before = files(tmp_path)
    new = tmp_path / "new.safetensors"
    for argv, said in (
        ([run.out, "--out", there], "--out: .* exists; give another place, or --force"),
        ([run.out, "--out", tmp_path / "a.ckpt"], r"--out must end in \.safetensors"),
        ([run.out, "--out", tmp_path / "d.safetensors", "--force"], "--out: .* is a directory"),
        ([tmp_path, "--out", new], "is no checkpoint, and no run with a complete one"),
        ([plain.out, "--out", new, "--ema"], "--ema: .* was not run with --use_ema"),
        ([plain.out, "--out", new, "--format", "lora_kohya"], "was not run with --lora_rank"),
        ([run.out, "--out", new, "--format", "diffusers", "--half"], "--half has no meaning with"),
    ):
        with pytest.raises(UserError, match=said):
            run_here(PROGRAM, argv)
    assert files(tmp_path) == before


def test_out_of_half_precisions_range(train, tmp_path):
    run = train(tmp_path / "run", max_train_steps=1)
    path = run.out / "checkpoint-1" / "unet.pth"
    state = torch.load(path, weights_only=True)
    state["conv_in.bias"][0] = 1e6
    torch.save(state, path)
    out = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"--half: .*input_blocks\.0\.0\.bias is out of"):
        run_here(PROGRAM, [run.out, "--out", out, "--half"])
    assert not out.exists()


def test_a_run_on_a_base_of_one_file_is_that_on_the_directory(run, kind, train, tmp_path):
    out = tmp_path / "base.safetensors"
    assert run_here(PROGRAM, [run.out, "--out", out]) == 0
    flags = {"max_train_steps": 2, "sdxl": kind == "sdxl", "learning_rate": 1e-3}
    cache = {"cache_dir_latents": tmp_path / "cache"}
    place = {"pretrained_model_name_or_path": out, "single_file_config": train.models[kind]}
    found = train(tmp_path / "file", **flags, **place, **cache)
    again = train(tmp_path / "again", **flags, **place, **cache)
    directory = {"pretrained_model_name_or_path": run.out / "pipeline"}
    want = train(tmp_path / "directory", **flags, **directory, cache_dir_latents=tmp_path / "other")
    assert identical(found.unet(), want.unet())
    assert identical(again.unet(), want.unet())
    assert identical(base_unet(found.out / "pipeline"), want.unet())

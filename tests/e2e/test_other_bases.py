"""Bases that do not predict noise, through the programs: SDXL that predicts v under a schedule of
zero terminal SNR, and the transformers under rectified flow."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from micro_bases import BUILD, save_base

from sdpo.config.families import FAMILIES

from .harness import (
    FLAGS,
    base_unet,
    check_close,
    distance,
    generation_argv,
    identical,
    run_here,
)

SAFE = {"use_winner_preserving": True, "winner_preserving_mu": 0.9}


BASES = ["v", "sd3", *BUILD]
# The others' files are short, and what they share with these is tried on these.
thorough = pytest.mark.parametrize("base", BASES[:5], indirect=True, scope="module")


@pytest.fixture(scope="module", params=BASES)
def base(request, tiny_sd3, tiny_v, tmp_path_factory):
    """The base's directory."""
    made = {"sd3": tiny_sd3, "v": tiny_v}
    if request.param in made:
        return made[request.param]
    path = tmp_path_factory.mktemp("base") / request.param
    save_base(request.param, path)
    return path


@pytest.fixture(scope="module")
def flags(base):
    return {**FLAGS, **SAFE, "pretrained_model_name_or_path": base, "train_batch_size": 4}


@pytest.fixture(scope="module")
def whole(train, flags, tmp_path_factory):
    """One run of one process that nothing interrupted."""
    return train(tmp_path_factory.mktemp("whole"), **flags)


def test_a_run(train, base, whole):
    first = whole.metrics[0]
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert whole.config["args"]["winner_preserving_scope"] == "pair"
    assert 0 < first["loser_scale_min"] < first["loser_scale"] < 1
    # Predicting nothing costs about 1 of v, and 2 of a velocity.
    assert first["ref_winner_mse"] > 0.3
    assert distance(whole.unet(), base_unet(base)) > 1e-4
    assert (whole.out / "pipeline/model_index.json").is_file()


@thorough
@pytest.mark.parametrize("method", ["diffusion-dpo", "dmpo", "dspo"])
def test_methods(train, base, method, tmp_path):
    """With the safeguard a run begins with the same errors and ends elsewhere."""
    plain, guarded = (
        train(
            tmp_path / name,
            pretrained_model_name_or_path=base,
            train_method=method,
            beta_dpo=20 if method == "dspo" else 5000,
            **safeguard,
        )
        for name, safeguard in (("plain", {}), ("guarded", SAFE))
    )
    for run in (plain, guarded):
        assert run.metrics[0]["margin"] == pytest.approx(0, abs=1e-6)
        assert all(torch.tensor(run.column("grad_norm")) > 0)
    assert plain.column("loser_scale") == [1.0] * 3
    assert max(guarded.column("loser_scale")) < 1
    for name in ("winner_mse", "ref_loser_mse"):
        assert plain.metrics[0][name] == guarded.metrics[0][name]
    assert not identical(plain.unet(), guarded.unet())


@thorough
def test_two_processes_train_the_same(train, base, flags, whole, tmp_path):
    two = train.processes(tmp_path / "two", 2, **{**flags, "train_batch_size": 2})
    check_close(two, whole, base_unet(base))


@thorough
def test_killed_it_ends_in_the_same_bits(train, base, flags, whole, tmp_path):
    fork = train.fork(tmp_path / "run", **flags)
    assert fork.send_at_step(signal.SIGKILL, tmp_path / "run", 3) == -signal.SIGKILL
    run = train(tmp_path / "run", **flags)
    assert identical(run.unet(), whole.unet())
    assert run.numbers == whole.numbers


def test_from_the_cache(train, flags, whole, tmp_path):
    cached = train(
        tmp_path / "run", **flags, cache_dir_latents=tmp_path / "cache", cache_dtype="fp32"
    )
    again = train(
        tmp_path / "again", **flags, cache_dir_latents=tmp_path / "cache", cache_dtype="fp32"
    )
    assert identical(cached.unet(), again.unet())
    for name in ("winner_mse", "ref_winner_mse", "loser_scale"):
        assert cached.column(name) == pytest.approx(whole.column(name), rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def adapters(train, base, flags, tmp_path_factory):
    """As `whole`, of adapters; None where diffusers reads none of the family."""
    if base.name in FAMILIES and not FAMILIES[base.name].lora_targets:
        return None
    return train(tmp_path_factory.mktemp("adapters"), **flags, lora_rank=2, lora_alpha=4)


@thorough
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_divided_between_two_processes(train, base, flags, whole, adapters, lora, tmp_path):
    """FSDP2, whose units are the family's blocks."""
    if (base / "unet").is_dir():
        pytest.skip("UNets are divided in test_sharding.py")
    if lora and adapters is None:
        pytest.skip("diffusers reads no LoRA of it")
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    flags = {**flags, "train_batch_size": 2}
    if lora:
        flags |= {"lora_rank": 2, "lora_alpha": 4}
    two = train.processes(tmp_path / "two", 2, asked, **flags)
    assert two.config["resolved"]["sharding"] == "FSDP2"
    check_close(two, adapters if lora else whole, base_unet(base))


def test_adapters_and_held_out_drift(base, adapters, pairs_dir):
    if adapters is None:
        pytest.skip("diffusers reads no LoRA of it")
    run = adapters
    assert run.metrics[0]["margin"] == pytest.approx(0, abs=1e-6)
    file = run.out / "pytorch_lora_weights.safetensors"
    from safetensors.torch import load_file

    part = "transformer." if (base / "transformer").is_dir() else "unet."
    assert all(name.startswith(part) for name in load_file(file))
    argv = ["--split", "heldout", "--max_pairs", 4, "--timesteps", 2]
    argv += ["--train_data_dir", pairs_dir]
    assert run_here("sdpo/evaluation/heldout.py", [run.out, *argv]) == 0
    lines = [json.loads(line) for line in (run.out / "heldout.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, *run.checkpoints]
    assert lines[0]["winner_drift"] == 0 != lines[-1]["winner_drift"]
    assert all(torch.isfinite(torch.tensor(line["winner_mse"])) for line in lines)


def test_images(base, whole, tmp_path):
    """Of a checkpoint and of the exported pipeline, the same; the base's own sampler."""
    suite = tmp_path / "suite.txt"
    suite.write_text("a red square\na blue circle\n")
    found = {}
    for name in ("checkpoint-4/unet.pth", "pipeline"):
        out = tmp_path / name.split("/")[0]
        argv = generation_argv(base, suite, out, "--dtype", "fp32")
        argv += ["--pretrained_vae_model_name_or_path", "base"]
        argv[argv.index("--unet") + 1] = str(whole.out / name)
        assert run_here("eval/generate.py", argv) == 0
        (manifest,) = out.glob("suite_*.json")
        entry = json.loads(manifest.read_text())[0]
        assert entry["metadata"]["protocol"] == "diffusers"
        found[name] = [path.read_bytes() for path in sorted(out.glob("*/*.png"))]
        assert len(found[name]) == 2
    assert found["pipeline"] == found["checkpoint-4/unet.pth"]

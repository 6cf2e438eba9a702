"""FSDP2 on CPUs: the same training, and checkpoints that any other run can go on from."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sdpo.common.errors import UserError
from sdpo.common.processes import ignore_accelerates_settings
from sdpo.models.lora import LORA_FILE
from sdpo.training.checkpoint import EMA_LORA_FILE
from sdpo.training.sharding import Sharding, launched_sharding

from .harness import (
    FLAGS,
    REPO,
    Run,
    as_argv,
    base_unet,
    check_close,
    distance,
    identical,
    resumed_copy,
)

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def sharded(train, out, count, reshard="true", **flags):
    """Train in `count` processes under FSDP2, to the end."""
    asked = {**ASKED, "FSDP_RESHARD_AFTER_FORWARD": reshard}
    return train.processes(out, count, asked, **flags)


@pytest.fixture(scope="module")
def two(train, tmp_path_factory):
    return sharded(train, tmp_path_factory.mktemp("two"), 2, **FLAGS, train_batch_size=2)


def test_two_processes_train_the_same(train, one, two):
    assert two.config["resolved"]["processes"] == 2
    assert two.config["resolved"]["fused_optimizer"] is True
    assert two.config["resolved"]["unet_parameters"] == one.config["resolved"]["unet_parameters"]
    check_close(two, one, base_unet(train.models["sd15"]))


def test_four_processes_train_the_same(train, one, tmp_path):
    four = sharded(train, tmp_path / "four", 4, **FLAGS, train_batch_size=1)
    check_close(four, one, base_unet(train.models["sd15"]))


def test_weights_left_whole_between_the_passes_train_the_same(train, one, tmp_path):
    run = sharded(train, tmp_path / "run", 2, reshard="false", **FLAGS, train_batch_size=2)
    check_close(run, one, base_unet(train.models["sd15"]))


def test_checkpoints_are_whole_and_plain(one, two):
    for name in ("unet.pth", "optimizer.pt"):
        mine = torch.load(two.out / "checkpoint-2" / name, weights_only=True)
        theirs = torch.load(one.out / "checkpoint-2" / name, weights_only=True)
        assert mine.keys() == theirs.keys()
    state = {k: v["exp_avg"].shape for k, v in mine["optimizer"]["state"].items()}
    assert state == {k: v["exp_avg"].shape for k, v in theirs["optimizer"]["state"].items()}
    from sdpo.models.loading import read_state_dict

    exported = read_state_dict(two.out / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert identical(exported, two.unet())


def test_one_process_goes_on_where_a_sharded_run_stopped(train, one, two, tmp_path):
    run = train(resumed_copy(two, tmp_path / "run"), **FLAGS, train_batch_size=4)
    assert run.config["resolved"]["resumed_from"].endswith("checkpoint-2")
    check_close(run, one, base_unet(train.models["sd15"]))


def test_a_sharded_run_goes_on_where_one_process_stopped(train, one, tmp_path):
    out = resumed_copy(one, tmp_path / "run")
    run = sharded(train, out, 2, **FLAGS, train_batch_size=2)
    assert run.config["resolved"]["resumed_from"].endswith("checkpoint-2")
    check_close(run, one, base_unet(train.models["sd15"]))


SDXL = {**FLAGS, "sdxl": True, "gradient_checkpointing": True, "use_adafactor": True}


@pytest.mark.parametrize(
    "own",
    [{"offload_reference": True}, {"use_adafactor": False, "lora_rank": 4, "use_dora": True}],
    ids=str,
)
def test_sdxl_in_bf16(train, tmp_path, own):
    """The SDXL recipes' own options; the first step that moves, before rounding has grown. Beside
    adapters, what is frozen is partly in half precision."""
    flags = {**SDXL, **own, "mixed_precision": "bf16", "max_train_steps": 2, "train_batch_size": 2}
    run = sharded(train, tmp_path / "two", 2, **flags)
    assert run.metrics[0]["margin"] == run.metrics[0]["winner_drift"] == 0.0
    plain = train.processes(tmp_path / "plain", 2, **flags)
    moved = distance(base_unet(train.models["sdxl"]), plain.unet())
    assert moved > 5e-5
    assert distance(run.unet(), plain.unet()) < 0.05 * moved


def test_adafactors_steps_and_state_are_those_of_whole_weights(train, tmp_path):
    flags = {**SDXL, "train_batch_size": 2}
    run = sharded(train, tmp_path / "two", 2, **flags)
    plain = train.processes(tmp_path / "plain", 2, **flags)
    mine, theirs = (
        torch.load(r.out / "checkpoint-2" / "optimizer.pt", weights_only=True)["optimizer"]
        for r in (run, plain)
    )
    shapes = [
        {(i, k): getattr(v, "shape", None) for i, s in o["state"].items() for k, v in s.items()}
        for o in (mine, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert any(name == "exp_avg_sq_row" for _, name in shapes[0])
    again = sharded(train, resumed_copy(plain, tmp_path / "again"), 2, **flags)
    base = base_unet(train.models["sdxl"])
    moved = distance(base, plain.unet())
    assert moved > 5e-5
    for other in (run, again):
        assert distance(other.unet(), plain.unet()) < 0.001 * moved


ADAPTERS = {
    **FLAGS,
    "lora_rank": 4,
    "use_ema": True,
    "ema_decay": 0.4,
    "validation_prompts": "a square",
    "validation_steps": 4,
}


@pytest.fixture(scope="module")
def adapters(train, tmp_path_factory):
    """Low-rank adapters, their average and samples: by one process and sharded over two."""
    out = tmp_path_factory.mktemp("adapters")
    return (
        train(out / "one", **ADAPTERS, train_batch_size=4),
        sharded(train, out / "two", 2, **ADAPTERS, train_batch_size=2),
    )


def check_adapters(run, expected, base) -> None:
    """Weights with the adapters computed in, the same averaged, and the adapters alone."""
    for name in ("unet.pth", "unet_ema.pth"):
        a, b = (
            torch.load(r.out / "checkpoint-4" / name, weights_only=True) for r in (run, expected)
        )
        moved = distance(a, base)
        assert moved > 1e-4
        assert distance(a, b) < 0.01 * moved
    for name in (LORA_FILE, EMA_LORA_FILE):
        a, b = (load_file(r.out / "checkpoint-4" / name) for r in (run, expected))
        assert distance(a, b) < 1e-4
        assert identical(a, load_file(run.out / name))


def test_adapters_average_and_samples(train, adapters):
    one, two = adapters
    check_adapters(two, one, base_unet(train.models["sd15"]))
    assert two.metrics[0]["margin"] == two.metrics[0]["winner_drift"] == 0.0
    names = [p.name for p in (one.out / "samples").iterdir()]
    assert sorted(names) == sorted(p.name for p in (two.out / "samples").iterdir())
    # Nothing is trained yet at the start: the very same image.
    first, mine = ((r.out / "samples" / "step-000000.png").read_bytes() for r in (one, two))
    assert first == mine
    weights = (base_unet(two.out / name) for name in ("pipeline", "pipeline_ema"))
    saved = (torch.load(two.out / "checkpoint-4" / f"unet{e}.pth") for e in ("", "_ema"))
    assert all(identical(a, b) for a, b in zip(weights, saved, strict=True))


def test_adapters_and_average_are_resumed_either_way(train, adapters, tmp_path):
    one, two = adapters
    base = base_unet(train.models["sd15"])
    mine = train(resumed_copy(two, tmp_path / "one"), **ADAPTERS, train_batch_size=4)
    check_adapters(mine, one, base)
    out = resumed_copy(one, tmp_path / "two")
    check_adapters(sharded(train, out, 2, **ADAPTERS, train_batch_size=2), one, base)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("fsdp2", "FSDP2"),
        ("zero2", "FSDP2"),
    ],
)
def test_the_configurations_ask_for_it(train, tmp_path, name, engine):
    """`accelerate launch` with a shipped file, on CPUs and with fewer processes."""
    config = (REPO / f"scripts/configs/{name}.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(config.replace("num_processes: 8", "num_processes: 2"))
    out = tmp_path / "run"
    flags = train.argv(out, max_train_steps=1)
    environment = {**os.environ, "SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    recipe = REPO / "scripts/train/sd15_diffusion_dpo.sh"
    small = as_argv({"gradient_accumulation_steps": 1, "dataloader_num_workers": 0})
    done = subprocess.run(
        ["bash", recipe, "--config", mine, *flags, *small],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    run = Run(out)
    resolved = run.config["resolved"]
    assert (resolved["processes"], resolved["sharding"]) == (2, engine)
    assert run.checkpoints == [1]


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_what_the_configurations_mean(make_config, monkeypatch, reshard):
    environment = {**ASKED, "WORLD_SIZE": "2", "FSDP_RESHARD_AFTER_FORWARD": reshard}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_sharding(make_config()) == Sharding(reshard == "true")
    ignore_accelerates_settings()
    # Accelerate is to take the processes for ordinary ones.
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"use_8bit_adam": True}, "--use_8bit_adam does not go with FSDP2"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 does not go with FSDP2"),
        ({"compile": True}, "--compile does not go with FSDP2"),
        ({"channels_last": True}, "--channels_last does not go with FSDP2"),
        (
            {"use_winner_preserving": True, "winner_preserving_space": "parameter"},
            "--winner_preserving_space parameter does not go with FSDP2",
        ),
    ],
)
def test_what_it_does_not_serve(make_config, monkeypatch, flags, sentence):
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sdpo.training.places.find_spec", lambda name: name)
    with pytest.raises(UserError, match=sentence):
        make_config(**flags)


def test_first_version_and_single_processes_are_refused(train, tmp_path, make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        make_config()
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match=r"fsdp_offload_params in .* not served"):
        make_config()
    monkeypatch.delenv("FSDP_OFFLOAD_PARAMS")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert launched_sharding(make_config()) is None
    fork = train.fork(tmp_path / "run", ASKED)
    assert fork.wait() == 2, fork.stderr
    assert "more than one process" in fork.stderr


def test_deepspeeds_own_engine_is_refused(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        UserError, match=r"DeepSpeed's own engine is not served: use --config zero2"
    ):
        make_config()

"""DeepSpeed's ZeRO on CPUs, where it is installed: the same training as by one process, and
checkpoints that any other run can go on from."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.training.sharding import check_deepspeed

from .harness import (
    FLAGS,
    Run,
    base_unet,
    check_close,
    distance,
    identical,
    needs_deepspeed,
    resumed_copy,
)

ASKED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}


def divided(train, out, count, **flags):
    """Train in `count` processes under DeepSpeed, to the end."""
    return train.processes(out, count, ASKED, **flags)


@pytest.fixture(scope="module")
def two(train, tmp_path_factory):
    return divided(train, tmp_path_factory.mktemp("two"), 2, **FLAGS, train_batch_size=2)


@needs_deepspeed
def test_two_processes_train_the_same(train, one, two):
    assert two.config["resolved"]["processes"] == 2
    assert two.config["resolved"]["sharding"] == "DeepSpeed"
    check_close(two, one, base_unet(train.models["sd15"]))
    assert two.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-3)
    assert two.column("lr") == one.column("lr")


@needs_deepspeed
def test_four_processes_train_the_same(train, one, tmp_path):
    four = divided(train, tmp_path / "four", 4, **FLAGS, train_batch_size=1)
    check_close(four, one, base_unet(train.models["sd15"]))


@needs_deepspeed
def test_checkpoints_are_whole_and_plain(one, two):
    for name in ("unet.pth", "optimizer.pt"):
        mine = torch.load(two.out / "checkpoint-2" / name, weights_only=True)
        theirs = torch.load(one.out / "checkpoint-2" / name, weights_only=True)
        assert mine.keys() == theirs.keys()
    mine, theirs = mine["optimizer"], theirs["optimizer"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, entry in theirs["state"].items():
        assert mine["state"][number]["step"] == entry["step"] == 2
        for name in ("exp_avg", "exp_avg_sq"):
            found = mine["state"][number][name]
            assert found.shape == entry[name].shape
            assert (found - entry[name]).norm() <= 1e-3 * entry[name].norm() + 1e-12
    assert mine["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]


@needs_deepspeed
def test_one_process_goes_on_where_it_stopped(train, one, two, tmp_path):
    run = train(resumed_copy(two, tmp_path / "run"), **FLAGS, train_batch_size=4)
    assert run.config["resolved"]["resumed_from"].endswith("checkpoint-2")
    check_close(run, one, base_unet(train.models["sd15"]))


@needs_deepspeed
def test_it_goes_on_where_one_process_stopped(train, one, tmp_path):
    out = resumed_copy(one, tmp_path / "run")
    run = divided(train, out, 2, **FLAGS, train_batch_size=2)
    assert run.config["resolved"]["resumed_from"].endswith("checkpoint-2")
    check_close(run, one, base_unet(train.models["sd15"]))


@needs_deepspeed
def test_sdxl_in_bf16_with_an_average_and_samples(train, tmp_path):
    """As far as the first step that moves, before rounding has grown."""
    flags = {**FLAGS, "sdxl": True, "mixed_precision": "bf16", "gradient_checkpointing": True}
    flags |= {"max_train_steps": 2, "train_batch_size": 2, "use_ema": True, "ema_decay": 0.5}
    flags |= {"validation_prompts": "a square", "validation_steps": 2}
    run = divided(train, tmp_path / "two", 2, **flags)
    plain = train.processes(tmp_path / "plain", 2, **flags)
    base = base_unet(train.models["sdxl"])
    moved = distance(base, plain.unet())
    assert moved > 5e-5
    assert distance(run.unet(), plain.unet()) < 0.05 * moved
    averages = [
        torch.load(r.out / "checkpoint-2" / "unet_ema.pth", weights_only=True) for r in (run, plain)
    ]
    assert distance(*averages) < 0.05 * moved
    assert sorted(p.name for p in (run.out / "samples").iterdir())
    assert identical(run.unet(), base_unet(run.out / "pipeline"))


@needs_deepspeed
def test_the_scale_over_the_parameters(train, tmp_path):
    flags = {**FLAGS, "use_winner_preserving": True, "winner_preserving_space": "parameter"}
    flags |= {"max_train_steps": 2, "train_batch_size": 2}
    run = divided(train, tmp_path / "two", 2, **flags)
    plain = train.processes(tmp_path / "plain", 2, **flags)
    assert run.column("loser_scale") == pytest.approx(plain.column("loser_scale"), rel=1e-3)
    assert run.metrics[-1]["loser_scale"] < 1
    check_close(run, plain, base_unet(train.models["sd15"]))


@needs_deepspeed
def test_a_step_that_is_not_finite_is_skipped(train, tmp_path):
    """A rate that blows up: the run ends at the same steps, with the same message."""
    flags = {**FLAGS, "learning_rate": 1e30, "lr_warmup_steps": 0, "max_nonfinite_steps": 1}
    ranks = train.start_processes(tmp_path / "two", 2, ASKED, **flags, train_batch_size=2)
    assert [fork.wait() for fork in ranks] == [2, 2]
    assert "--max_nonfinite_steps 1" in ranks[0].stderr
    run = Run(tmp_path / "two")
    assert run.column("nonfinite_steps")[0] == 0


@pytest.fixture
def asked(monkeypatch):
    for name, value in {**ASKED, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sdpo.training.sharding.find_spec", lambda name: name)


def test_what_the_launcher_asks_for(make_args, asked):
    assert check_deepspeed(make_args()) is True
    # Accelerate is to take the processes for ordinary ones.
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert check_deepspeed(make_args()) is False


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lora_rank": 4}, "--lora_rank does not go with DeepSpeed"),
        ({"use_adafactor": True}, "--use_adafactor does not go with DeepSpeed"),
        ({"use_8bit_adam": True}, "--use_8bit_adam does not go with DeepSpeed"),
        ({"channels_last": True}, "--channels_last does not go with DeepSpeed"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 does not go with DeepSpeed"),
    ],
)
def test_what_it_does_not_serve(make_args, asked, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        check_deepspeed(argparse.Namespace(**{**vars(make_args()), **flags}))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ZERO_STAGE", "3", "zero_stage 3 in the launch configuration is not served: use 2"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device cpu"),
        ("CONFIG_FILE", "ds.json", "config_file ds.json"),
    ],
)
def test_what_of_its_configuration_is_not_served(
    make_args, asked, monkeypatch, name, value, sentence
):
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UserError, match=sentence):
        check_deepspeed(make_args())


def test_single_processes_and_a_missing_package_are_refused(make_args, asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="more than one process"):
        check_deepspeed(make_args())
    monkeypatch.setattr("sdpo.training.sharding.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed, or use --config zero2"):
        check_deepspeed(make_args())

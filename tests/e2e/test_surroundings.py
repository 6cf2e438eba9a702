"""What lies around a run - environment, other runs, its own end - does not change it unseen."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.common.processes import ignore_accelerates_settings
from sdpo.training import places
from sdpo.training import run as run_module

from .harness import Run, distance, files, identical

ACCELERATES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_MEGATRON_LM": "true",
}


def test_accelerates_variables_change_nothing(train, tmp_path):
    plain = train.fork(tmp_path / "plain", use_ema=True)
    assert plain.wait() == 0, plain.stderr
    fork = train.fork(tmp_path / "run", ACCELERATES, use_ema=True)
    assert fork.wait() == 0, fork.stderr
    run, other = Run(tmp_path / "run"), Run(tmp_path / "plain")
    assert identical(run.unet(), other.unet())
    assert run.numbers == other.numbers
    assert run.column("step") == [1, 2, 3]


def test_which_variables_stay(monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_SOMETHING_NEW"):
        monkeypatch.setenv(name, "1")
    ignore_accelerates_settings()
    left = {name for name in os.environ if name.startswith("ACCELERATE_")}
    assert left == {"ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_processes_join_on_cpus(train, tmp_path):
    """torchrun tells them of each other and not that they are to run on CPUs."""
    out = tmp_path / "run"
    ranks = train.start_processes(out, 2, {"ACCELERATE_USE_CPU": "false"})
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert Run(out).config["resolved"]["processes"] == 2


def test_processes_that_would_run_alone_are_refused(train, tmp_path, monkeypatch):
    """As with Apple's accelerator, or with no launcher at all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^WORLD_SIZE=2 in the environment, but each .* alone"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("USE_CPU", "maybe"), ("TORCH_DEVICE", "junk")])
def test_variables_that_are_wrong_are_named(train, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=f"^ACCELERATE_{name}={value} in the environment: "):
        train(tmp_path / "run")


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "comet_ml", "mlflow"])
def test_tracker_that_is_not_installed(make_config, monkeypatch, tracker):
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--report_to {tracker}: .* pip install {tracker}"):
        make_config(report_to=tracker)
    monkeypatch.setattr(places, "find_spec", lambda name: object())
    assert make_config(report_to=tracker).run.report_to == tracker


def test_two_runs_in_one_directory(train, tmp_path):
    out = tmp_path / "run"
    first = train.fork(out, max_train_steps=400, dataloader_num_workers=1)
    metrics = out / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()) and first.process.is_alive():
        time.sleep(0.05)
    os.kill(first.process.pid, signal.SIGSTOP)
    before = files(out)
    assert f"--output_dir: another run is writing to {out}" in train.fails(out)
    assert files(out) == before
    os.kill(first.process.pid, signal.SIGCONT)
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait() == 143, first.stderr
    done = Run(out).checkpoints[-1]
    assert train(out, max_train_steps=done + 1).checkpoints == [done, done + 1]


def test_second_run_of_two_processes(train, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / run_module.LOCK_FILE):
        ranks = train.start_processes(tmp_path / "run", 2)
        assert [rank.wait() for rank in ranks] == [2, 2]
    assert all("another run is writing" in rank.stderr for rank in ranks)


def test_last_steps_not_finite(train, tmp_path):
    out = tmp_path / "run"
    train(out, max_train_steps=2, checkpointing_steps=2)
    before = files(out / "checkpoint-2")
    line = train.fails(out, max_train_steps=6, checkpointing_steps=1, learning_rate=1e30)
    assert "not finite" in line
    assert "--learning_rate" in line
    assert "checkpoint-" in line
    for step in Run(out).checkpoints:
        assert all(torch.isfinite(t).all() for t in Run(out).unet(step).values())
    assert files(out / "checkpoint-2") == before


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch):
    """Also where every loss and gradient was."""
    before = torch.optim.AdamW.step

    def overflow(self, *arguments, **options):
        done = before(self, *arguments, **options)
        next(iter(self.param_groups[0]["params"])).data.view(-1)[0] = float("inf")
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(UserError, match="the last good checkpoint is none"):
        train(tmp_path / "run", max_train_steps=1)
    assert Run(tmp_path / "run").checkpoints == []
    assert not (tmp_path / "run" / "pipeline").exists()


@pytest.mark.parametrize("rate", [1e-7, 1e-8])
def test_polynomial_schedule_of_a_small_rate(train, tmp_path, rate):
    run = train(tmp_path / "run", lr_scheduler="polynomial", learning_rate=rate, max_train_steps=4)
    assert run.column("lr") == pytest.approx([rate * share for share in (1, 0.75, 0.5, 0.25)])


def test_adafactor_is_not_clipped(train, tmp_path):
    """As in the official code; AdamW is. The norm is logged either way."""
    flags = {"use_adafactor": True, "max_train_steps": 2, "learning_rate": 1e-3}
    loose = train(tmp_path / "loose", **flags, max_grad_norm=1e6)
    tight = train(tmp_path / "tight", **flags, max_grad_norm=1e-6)
    assert identical(loose.unet(), tight.unet())
    assert loose.column("grad_norm") == tight.column("grad_norm")
    assert all(norm > 1e-6 for norm in tight.column("grad_norm"))
    adamw = {"max_train_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    loose = train(tmp_path / "adamw-loose", **adamw, max_grad_norm=1e6)
    tight = train(tmp_path / "adamw-tight", **adamw, max_grad_norm=1e-6)
    assert distance(loose.unet(), tight.unet()) > 0

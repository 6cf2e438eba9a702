"""Whatever ends a run, the steps that are done are saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.order import epoch_permutation
from sdpo.training.step import Step

from .harness import REPO, Run, files, identical, last_sentence

STEPS = 400
FLAGS = {"max_train_steps": STEPS, "checkpointing_steps": 1000, "dataloader_num_workers": 2}
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(out: Path, step: int, alive) -> None:
    deadline = time.monotonic() + 240
    metrics = out / "metrics.jsonl"
    while alive() and time.monotonic() < deadline:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def check_saved(out: Path, least: int) -> Run:
    """The last logged step is the one checkpoint, and its weights are finite."""
    run = Run(out)
    done = run.metrics[-1]["step"]
    assert least <= done < STEPS
    assert run.checkpoints == [done]
    assert all(torch.isfinite(t).all() for t in run.unet().values())
    return run


@pytest.mark.parametrize(("number", "times"), [("SIGTERM", 1), ("SIGTERM", 3), ("SIGINT", 1)])
def test_signal_to_the_group(train, tmp_path, number, times):
    out, sent = tmp_path / "run", getattr(signal, number)
    fork = train.fork(out, **FLAGS)
    wait_for_step(out, 3, fork.process.is_alive)
    workers = children(fork.process.pid)
    assert len(workers) == 2
    for _ in range(times):
        os.killpg(fork.process.pid, sent)
        time.sleep(0.05)
    assert fork.wait() == 128 + sent, fork.stderr
    assert "Traceback" not in fork.stderr
    check_saved(out, 3)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_signal_to_the_group_of_two_processes(train, tmp_path):
    out = tmp_path / "run"
    ranks = train.start_processes(out, 2, **FLAGS)
    wait_for_step(out, 3, ranks[0].process.is_alive)
    for rank in ranks:
        os.killpg(rank.process.pid, signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].stderr
    check_saved(out, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_signal_to_a_launcher_and_all_that_it_started(train, tmp_path, processes):
    """The launcher passes the signal on as well, so that the processes get it twice."""
    out, log = tmp_path / "run", tmp_path / "log"
    kind = "--cpu" if processes == 1 else "--multi_gpu"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", kind, "--num_machines", "1"]
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", str(REPO / "train.py")]
    with open(log, "wb") as file:
        launched = subprocess.Popen(
            launcher + train.argv(out, **FLAGS),
            cwd=REPO,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for_step(out, 3, lambda: launched.poll() is None)
        os.killpg(launched.pid, signal.SIGTERM)
        assert launched.wait(120) != 0
    # A launcher of one process does not wait for it.
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoint-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.1)
    check_saved(out, 3)
    assert Run(out).config["resolved"]["processes"] == processes


def test_later_signal_ends_at_once():
    program = (
        "import signal, time; from sdpo.common import signals; stop = signals.StopRequest();"
        "signal.raise_signal(15); signal.raise_signal(15); assert stop.exit_code == 143;"
        "stop._at -= signals.SAME_REQUEST; signal.raise_signal(15); print('still there')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True)
    assert ended.returncode == -signal.SIGTERM
    assert b"still there" not in ended.stdout


@pytest.mark.parametrize("streaming", [False, True])
def test_killed_data_worker(train, tmp_path, streaming):
    """As by the system where memory runs out."""
    out = tmp_path / "run"
    workers = 1 if streaming else 2
    flags = {**FLAGS, "streaming": streaming, "dataloader_num_workers": workers}
    fork = train.fork(out, **flags)
    wait_for_step(out, 3, fork.process.is_alive)
    os.kill(children(fork.process.pid)[-1], signal.SIGKILL)
    assert fork.wait() == 2, fork.stderr
    assert "--dataloader_num_workers" in last_sentence(fork.stderr)
    run = check_saved(out, 3)
    more = run.checkpoints[0] + 2
    train(out, **{**flags, "max_train_steps": more, "dataloader_num_workers": 0})
    straight = train(tmp_path / "straight", **{**flags, "max_train_steps": more})
    assert identical(run.unet(more), straight.unet(more))


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_data_worker_of_one_of_two_processes(train, tmp_path, rank):
    """All processes end at the same place with the same sentence, and what is done is saved."""
    out = tmp_path / "run"
    ranks = train.start_processes(out, 2, **{**FLAGS, "gradient_accumulation_steps": 2})
    wait_for_step(out, 3, ranks[0].process.is_alive)
    os.kill(children(ranks[rank].process.pid)[-1], signal.SIGKILL)
    assert [r.wait() for r in ranks] == [2, 2], ranks[1 - rank].stderr
    sentences = [last_sentence(r.stderr) for r in ranks]
    assert "--dataloader_num_workers" in sentences[0]
    assert sentences[0] == sentences[1]
    run = check_saved(out, 3)
    assert run.config["resolved"]["processes"] == 2


@pytest.mark.parametrize(("step", "launcher"), [(1, {}), (3, {}), (3, SHARDED)])
def test_data_error_of_one_of_two_processes(train, pairs_dir, tmp_path, step, launcher):
    """With the first batch or later, the same sentence of both; what was done before is saved."""
    rows = pq.read_table(sorted(pairs_dir.glob("train-*.parquet"))[0]).to_pylist()
    rows = [row for row in rows if row["label_0"] != 0.5][:16]
    # The last pair of a step of two processes with two pairs each is the second one's.
    rows[int(epoch_permutation(16, 0, 0)[4 * step - 1])]["jpg_0"] = b"no image"
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs" / "train.parquet")
    out, flags = tmp_path / "run", {"max_train_steps": 4, "checkpointing_steps": 1000}
    flags |= {"train_data_dir": tmp_path / "pairs", "seed": 0}
    ranks = train.start_processes(out, 2, launcher, **flags, max_bad_fraction=0)
    assert [r.wait() for r in ranks] == [2, 2], ranks[0].stderr
    (sentence,) = {last_sentence(r.stderr) for r in ranks}
    assert f"1 of {2 * step} pairs" in sentence
    assert Run(out).checkpoints == ([] if step == 1 else [2])
    assert [e["step"] for e in Run(out).metrics] == list(range(1, step))
    resumed = train.processes(out, 2, launcher, **flags)
    straight = train.processes(tmp_path / "straight", 2, launcher, **flags)
    assert identical(resumed.unet(), straight.unet())
    assert [entry["loss"] for entry in resumed.metrics] == straight.column("loss")


def test_killed_data_worker_of_the_cache(train, tmp_path, monkeypatch):
    from sdpo.data.latents import build

    def end_at_once(self, row):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(build._Images, "__getitem__", end_at_once)
    flags = {**FLAGS, "cache_dir_latents": tmp_path / "cache"}
    with pytest.raises(UserError, match="--dataloader_num_workers"):
        train(tmp_path / "run", **flags)


def test_any_error_between_steps_saves(train, tmp_path, monkeypatch):
    before = Step.record

    def fail(self, *arguments):
        if self.number == 4:
            raise ZeroDivisionError("something nobody thought of")
        return before(self, *arguments)

    monkeypatch.setattr(Step, "record", fail)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", max_train_steps=6)
    check_saved(tmp_path / "run", 3)
    monkeypatch.undo()
    resumed = train(tmp_path / "run", max_train_steps=6)
    straight = train(tmp_path / "straight", max_train_steps=6)
    assert identical(resumed.unet(), straight.unet())
    assert resumed.numbers == straight.numbers


def test_error_amid_the_optimizers_step_saves_nothing(train, tmp_path, monkeypatch):
    """Some of the weights have moved, others have not."""
    before = torch.optim.AdamW.step
    calls = []

    def fail(self, *arguments, **options):
        calls.append(before(self, *arguments, **options))
        if len(calls) == 4:
            raise RuntimeError("amid the step")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="amid the step"):
        train(tmp_path / "run", max_train_steps=6, checkpointing_steps=2)
    assert Run(tmp_path / "run").checkpoints == [2]


def test_error_that_resumes_at_once_leaves_the_checkpoint(train, tmp_path, monkeypatch):
    train(tmp_path / "run", max_train_steps=2, checkpointing_steps=2)
    before = files(tmp_path / "run" / "checkpoint-2")

    def fail(self, *arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(Step, "record", fail)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", max_train_steps=6)
    assert Run(tmp_path / "run").checkpoints == [2]
    assert files(tmp_path / "run" / "checkpoint-2") == before

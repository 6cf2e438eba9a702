"""Killed at any moment and started again with the same command, a run ends in the same bits."""

from __future__ import annotations

import random
import shutil
import signal

import pytest

from .harness import Run, distance, files, identical

STEPS = 14
# 12 pairs, 2 x 2 a step: three steps an epoch, so that checkpoints fall within and between epochs.
FLAGS = {
    "max_train_samples": 12,
    "gradient_accumulation_steps": 2,
    "max_train_steps": STEPS,
    "checkpointing_steps": 2,
    "use_winner_preserving": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "random_crop": True,
    "noise_offset": 0.05,
}
KINDS = {
    "adamw": {},
    "adafactor": {"use_adafactor": True},
    "streaming": {"streaming": True},
}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """`whole(kind)`: a run that nothing interrupted, made once."""
    made = {}

    def run(kind: str) -> Run:
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp(kind), **FLAGS, **KINDS[kind])
        return made[kind]

    return run


def check_same(run: Run, whole: Run) -> None:
    """Weights, optimizer state and metrics of an interrupted run and of one that was not."""
    assert run.checkpoints == whole.checkpoints
    for step in whole.checkpoints:
        assert identical(run.unet(step), whole.unet(step)), step
    assert [entry["step"] for entry in run.metrics] == list(range(1, STEPS + 1))
    assert run.numbers == whole.numbers
    assert (run.out / "pipeline" / "model_index.json").is_file()
    assert not list(run.out.glob("*.tmp"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_several_kills(train, whole, tmp_path, kind, workers):
    out = tmp_path / "run"
    flags = {**FLAGS, **KINDS[kind], "dataloader_num_workers": workers}
    chance = random.Random(f"{kind}-{workers}")
    killed = 0
    for step in (1, 4, 7, 11):
        fork = train.fork(out, **flags)
        code = fork.send_at_step(signal.SIGKILL, out, step, delay=chance.random() * 0.15)
        assert code in (0, -signal.SIGKILL), fork.stderr
        killed += code != 0
    assert killed >= 3
    last = train.fork(out, **flags)
    assert last.wait() == 0, last.stderr
    check_same(Run(out), whole(kind))
    assert whole(kind).metrics[-1]["epoch"] >= 4


def test_kills_at_random_moments(train, whole, tmp_path):
    """Also while models load, a checkpoint is written or the pipeline is exported."""
    out = tmp_path / "run"
    chance = random.Random(5)
    for _ in range(6):
        fork = train.fork(out, **FLAGS)
        fork.process.join(0.4 + 2.5 * chance.random())
        fork.kill()
        assert fork.wait() in (0, -signal.SIGKILL), fork.stderr
    last = train.fork(out, **FLAGS)
    assert last.wait() == 0, last.stderr
    check_same(Run(out), whole("adamw"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(train, whole, tmp_path, number):
    out = tmp_path / "run"
    flags = {**FLAGS, "checkpointing_steps": 100}
    fork = train.fork(out, **flags)
    assert fork.send_at_step(number, out, 5) == 128 + number, fork.stderr
    stopped = Run(out)
    done = stopped.metrics[-1]["step"]
    assert 5 <= done < STEPS
    assert stopped.checkpoints == [done]
    assert "Traceback" not in fork.stderr
    assert not (out / "pipeline").exists()

    last = train.fork(out, **flags)
    assert last.wait() == 0, last.stderr
    assert identical(Run(out).unet(), whole("adamw").unet())
    assert Run(out).numbers == whole("adamw").numbers


def test_half_written_checkpoint_is_ignored_and_cleared(train, whole, tmp_path):
    out = tmp_path / "run"
    train(out, **{**FLAGS, "max_train_steps": 4, "lr_scheduler": "constant_with_warmup"})
    shutil.rmtree(out)
    shutil.copytree(whole("adamw").out, out)
    for step in range(8, STEPS + 1, 2):
        shutil.rmtree(out / f"checkpoint-{step}")
    shutil.copytree(out / "checkpoint-6", out / "checkpoint-12.tmp")
    (out / "checkpoint-12.tmp" / "unet.pth").write_bytes(b"half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')
    run = train(out, **FLAGS)
    assert run.config["resolved"]["resumed_from"].endswith("checkpoint-6")
    check_same(run, whole("adamw"))


def test_named_checkpoint(train, whole, tmp_path):
    """Into another directory, from a checkpoint that is not the newest."""
    origin = whole("adamw")
    before = files(origin.out)
    named = origin.out / "checkpoint-4"
    run = train(tmp_path / "other", **FLAGS, resume_from_checkpoint=named)
    assert run.column("step") == list(range(5, STEPS + 1))
    assert identical(run.unet(), origin.unet())
    assert run.numbers == origin.numbers[4:]
    assert files(origin.out) == before


def test_longer_run_goes_on(train, tmp_path):
    """More --max_train_steps on a finished run gives what a run of that length gives."""
    flags = {"max_train_samples": 12, "checkpointing_steps": 4}
    train(tmp_path / "run", **flags, max_train_steps=3)
    extended = train(tmp_path / "run", **flags, max_train_steps=7)
    straight = train(tmp_path / "straight", **flags, max_train_steps=7)
    assert extended.checkpoints == [3, 4, 7]
    assert identical(extended.unet(), straight.unet())
    assert extended.numbers == straight.numbers


@pytest.mark.parametrize("use_adafactor", [False, True])
def test_changed_learning_rate_counts(train, tmp_path, use_adafactor):
    """As the sentence after a run of non-finite steps advises."""
    flags = {"use_adafactor": use_adafactor, "lr_warmup_steps": 4, "lr_scheduler": "cosine"}
    train(tmp_path / "run", **flags, max_train_steps=2)
    run = train(tmp_path / "run", **flags, max_train_steps=6, learning_rate=2e-5)
    assert run.column("lr") == pytest.approx([0, 2.5e-5, 1e-5, 1.5e-5, 2e-5, 1e-5])
    usual = train(tmp_path / "usual", **flags, max_train_steps=6, checkpointing_steps=2)
    assert identical(usual.unet(2), run.unet(2))
    assert 0 < distance(run.unet(), run.unet(2)) < 0.5 * distance(usual.unet(), usual.unet(2))


def test_checkpoints_total_limit(train, tmp_path):
    run = train(
        tmp_path / "run", max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2
    )
    assert run.checkpoints == [6, 7]
    assert not list(run.out.glob("*.tmp"))


def test_finished_run_stays_as_it_is(train, whole, tmp_path):
    done = whole("adamw").out
    out = tmp_path / done.name  # which is the card's title
    shutil.copytree(done, out)
    flags = {**FLAGS, "output_dir": out}
    before = files(out)
    fork = train.fork(out, **flags)
    assert fork.wait() == 0, fork.stderr
    after = files(out)
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"config.json"}
    assert f"step {STEPS} of {STEPS} is done: nothing is trained" in fork.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"resume_from_checkpoint": "none"}, "--resume_from_checkpoint none"),
        ({"seed": 1}, "--seed"),
        ({"use_adafactor": True}, "--use_adafactor"),
        ({"train_method": "dmpo"}, "--train_method"),
        ({"streaming": True}, "--streaming"),
        ({"resume_from_checkpoint": "nowhere/checkpoint-3"}, "nowhere/checkpoint-3"),
    ],
)
def test_refusals_touch_nothing(train, whole, flags, said):
    out = whole("adamw").out
    before = files(out)
    assert said in train.fails(out, **{**FLAGS, **flags})
    assert files(out) == before


def test_earlier_checkpoint_of_the_same_directory_is_refused(train, whole):
    """Its later checkpoints would be mistaken for those of the new course."""
    out = whole("adamw").out
    before = files(out)
    line = train.fails(out, **FLAGS, resume_from_checkpoint=out / "checkpoint-4")
    assert f"checkpoint-{STEPS}" in line
    assert files(out) == before


def test_unreadable_newest_checkpoint(train, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw").out, out)
    newest = out / f"checkpoint-{STEPS}" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert f"checkpoint-{STEPS}" in train.fails(out, **FLAGS)
    assert identical(Run(out).unet(), whole("adamw").unet())

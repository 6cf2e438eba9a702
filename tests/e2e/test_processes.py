"""The number of processes and of data workers does not change what is trained."""

from __future__ import annotations

import shutil
import signal

import pytest

from .harness import FLAGS, base_unet, check_close, identical, last_sentence, resumed_copy


@pytest.fixture(scope="module")
def two(train, tmp_path_factory):
    return train.processes(tmp_path_factory.mktemp("two"), 2, **FLAGS, train_batch_size=2)


def test_two_processes_train_the_same(train, one, two):
    assert two.config["resolved"]["processes"] == 2
    assert two.config["resolved"]["pairs_per_step"] == one.config["resolved"]["pairs_per_step"] == 8
    check_close(two, one, base_unet(train.models["sd15"]))


def test_four_processes_train_the_same_and_one_goes_on(train, one, tmp_path):
    base = base_unet(train.models["sd15"])
    out = tmp_path / "run"
    check_close(train.processes(out, 4, **FLAGS, train_batch_size=1), one, base)
    shutil.rmtree(out / "checkpoint-4")
    check_close(train(out, **FLAGS, train_batch_size=4), one, base)


def test_schedule_steps_once_per_optimizer_step(one, two):
    # Warm-up over 2 steps, then linear to zero at step 4.
    expected = [0.0, 0.5e-3, 1e-3, 0.5e-3]
    assert one.column("lr") == pytest.approx(expected)
    assert two.column("lr") == pytest.approx(expected)


def test_one_process_goes_on_where_two_stopped(train, one, two, tmp_path):
    run = train(resumed_copy(two, tmp_path / "run"), **FLAGS, train_batch_size=4)
    assert run.config["resolved"]["resumed_from"].endswith("checkpoint-2")
    check_close(run, one, base_unet(train.models["sd15"]))


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_go_on_where_one_stopped(train, one, tmp_path, count):
    out = resumed_copy(one, tmp_path / "run")
    run = train.processes(out, count, **FLAGS, train_batch_size=4 // count)
    check_close(run, one, base_unet(train.models["sd15"]))


def test_machines_that_share_no_disk_cannot_resume(train, two, tmp_path):
    flags = {**FLAGS, "train_batch_size": 2, "max_train_steps": 6}
    ranks = train.start_processes([two.out, tmp_path / "empty"], 2, **flags)
    for rank in ranks:
        assert rank.wait() == 2, rank.stderr
        line = last_sentence(rank.stderr)
        assert "--output_dir" in line
        assert "[0, 4]" in line
    assert two.checkpoints == [2, 4]


def test_streaming_in_two_processes(train, tmp_path):
    flags = {**FLAGS, "streaming": True}
    one = train(tmp_path / "one", **flags, train_batch_size=4)
    two = train.processes(tmp_path / "two", 2, **flags, train_batch_size=2)
    check_close(two, one, base_unet(train.models["sd15"]))


@pytest.mark.parametrize("sdxl", [False, True])
def test_buckets_in_two_processes_and_after_a_kill(train, shaped_pairs, tmp_path, sdxl):
    flags = {
        **FLAGS,
        "train_data_dir": shaped_pairs,
        "resize": "bucket",
        "random_crop": True,
        "sdxl": sdxl,
    }
    flags["max_train_steps"] = 6
    one = train(tmp_path / "one", **flags, train_batch_size=4)
    two = train.processes(tmp_path / "two", 2, **flags, train_batch_size=2)
    check_close(two, one, base_unet(train.models["sdxl" if sdxl else "sd15"]))
    if sdxl:
        return
    out = tmp_path / "killed"
    workers = {**flags, "train_batch_size": 4, "dataloader_num_workers": 1}
    fork = train.fork(out, **workers)
    assert fork.send_at_step(signal.SIGKILL, out, 3) in (0, -signal.SIGKILL), fork.stderr
    last = train.fork(out, **workers)
    assert last.wait() == 0, last.stderr
    assert identical(train.run(out).unet(), one.unet())
    assert train.run(out).numbers == one.numbers


def test_scale_lr_counts_processes(train, tmp_path):
    flags = {"scale_lr": True, "learning_rate": 1e-6, "gradient_accumulation_steps": 3}
    run = train.processes(tmp_path / "run", 2, **flags, max_train_steps=1, train_batch_size=2)
    assert run.column("lr") == pytest.approx([1e-6 * 2 * 2 * 3])
    assert run.config["resolved"]["learning_rate"] == pytest.approx(1.2e-5)


def test_both_processes_stop_on_a_signal_to_one(train, tmp_path):
    """The launcher sends a signal to all, but not at the same moment."""
    flags = {**FLAGS, "max_train_steps": 400, "checkpointing_steps": 1000}
    out = tmp_path / "run"
    ranks = train.start_processes(out, 2, **flags)
    assert ranks[0].send_at_step(signal.SIGTERM, out, 3) == 143, ranks[0].stderr
    # The other one learns of it from the first; its own signal never came.
    assert ranks[1].wait() == 143, ranks[1].stderr
    saved = [int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")]
    assert len(saved) == 1
    assert saved[0] >= 3


@pytest.mark.parametrize("streaming", [False, True])
def test_data_workers(train, tmp_path, streaming):
    flags = {"max_train_samples": 12, "max_train_steps": 5, "random_crop": True}
    flags["streaming"] = streaming
    counts = (0, 1) if streaming else (0, 2)
    runs = []
    for workers in counts:
        fork = train.fork(tmp_path / str(workers), **flags, dataloader_num_workers=workers)
        assert fork.wait() == 0, fork.stderr
        runs.append(train.run(tmp_path / str(workers)))
    assert identical(runs[0].unet(), runs[1].unet())
    assert runs[0].numbers == runs[1].numbers

"""Where there is no room, or no directory any more: one sentence, and what is there stays whole."""

from __future__ import annotations

import errno
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from sdpo.common.errors import UserError
from sdpo.common.files import disk_is_full, write_json
from sdpo.data.latents import build, store
from sdpo.evaluation.score.scoring import _room
from sdpo.training.step import Step

from .harness import Run, files, identical


@contextmanager
def files_up_to(size: int):
    """Let writing beyond `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}])
def test_a_checkpoint_without_room(train, tmp_path, flags):
    out = tmp_path / "run"
    train(out, max_train_steps=2, checkpointing_steps=2, **flags)
    before = files(out / "checkpoint-2")
    with files_up_to(60_000), pytest.raises(UserError, match=f"--output_dir: .*{out}.*room"):
        train(out, max_train_steps=4, checkpointing_steps=3, **flags)
    assert Run(out).checkpoints == [2]
    assert files(out / "checkpoint-2") == before
    assert not list(out.glob("*.tmp"))
    run = train(out, max_train_steps=4, checkpointing_steps=3, **flags)
    assert run.checkpoints == [2, 3, 4]
    assert run.column("step") == [1, 2, 3, 4]


@pytest.mark.parametrize("what", ["latents", "text"])
def test_a_cache_of_encodings_without_room(train, tmp_path, monkeypatch, what):
    """At its third shard; what is half written counts in no later run."""
    cache, flags = tmp_path / "cache", {"max_train_samples": 6, "max_train_steps": 2}
    flags["cache_dir_latents"] = cache
    write = store.write_bytes

    def write_some(path, content):
        full = path.name.startswith(what) and len(list(cache.glob(f"{what}-*.safetensors"))) == 2
        with files_up_to(50 if full else 1 << 30):
            write(path, content)

    with monkeypatch.context() as small:
        small.setattr(build, "SHARD_BYTES", 1)
        small.setattr(store, "write_bytes", write_some)
        with pytest.raises(UserError, match=f"cannot write to {cache} .*: make room there"):
            train(tmp_path / "run", **flags)
    assert len(list(cache.glob(f"{what}-*.safetensors"))) == 2
    assert not list(cache.glob("*.tmp"))
    assert not Run(tmp_path / "run").checkpoints
    run = train(tmp_path / "run", **flags, verify_cache=True)
    straight = train(tmp_path / "straight", **{**flags, "cache_dir_latents": tmp_path / "other"})
    assert identical(run.unet(), straight.unet())


def test_pairs_without_room_for_what_datasets_makes_of_them(train, tmp_path):
    cache = tmp_path / "cache"
    with files_up_to(5_000), pytest.raises(UserError, match=f"--cache_dir: .*{cache}.*make room"):
        train(tmp_path / "run", cache_dir=cache)
    assert train(tmp_path / "run", cache_dir=cache).checkpoints == [3]


def test_a_file_without_room(tmp_path):
    write_json(tmp_path / "a.json", {"there": "before"})
    before = files(tmp_path)
    with files_up_to(1000), pytest.raises(UserError, match=f"cannot write to {tmp_path}"):
        write_json(tmp_path / "a.json", {"much": "x" * 5000})
    assert files(tmp_path) == before


def test_what_counts_as_full():
    assert disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert disk_is_full(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"))
    assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_is_full(FileNotFoundError(errno.ENOENT, "No such file"))
    assert not disk_is_full(RuntimeError("CUDA out of memory"))


def test_scoring_without_room_in_tmpdir():
    with files_up_to(10_000), pytest.raises(UserError, match=r"TMPDIR: .* no room for 1 MiB"):
        _room((4, 3, 256, 256), np.dtype(np.uint8))
    room = _room((2, 3, 4, 4), np.dtype(np.float32))
    assert room.shape == (2, 3, 4, 4)
    assert (room == 0).all()


def test_output_directory_deleted_under_the_run(train, tmp_path, monkeypatch):
    out = tmp_path / "run"
    before = Step.record

    def delete(self, *arguments):
        if self.number == 3:
            shutil.rmtree(out)
        return before(self, *arguments)

    monkeypatch.setattr(Step, "record", delete)
    with pytest.raises(UserError, match=f"--output_dir: {out}.* was deleted"):
        train(out, max_train_steps=6)
    assert Run(out).checkpoints == [3]

"""Places that cannot be written to are one sentence that names them, before anything is lost."""

from __future__ import annotations

import os

import pytest

from sdpo.common.errors import UserError
from sdpo.common.files import (
    check_claim,
    check_directory,
    claim_directory,
    make_directory,
    rename_complete,
    write_text,
    written_beside,
)
from sdpo.common.flags import defaults_of
from sdpo.config import TrainConfig


def test_directories_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, said in (
        (tmp_path / "file", "exists and is not a directory"),
        (tmp_path / "file" / "deep" / "er", f"since {tmp_path / 'file'} is a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=f"^--out: {path} ") as caught:
            check_directory(path, "--out")
        assert said in str(caught.value)
        with pytest.raises(UserError, match=f"^--out: cannot make {path} "):
            make_directory(path, "--out")
    check_directory(tmp_path / "new" / "deeper", "--out")
    make_directory(tmp_path / "new" / "deeper", "--out")
    check_directory(tmp_path / "new" / "deeper", "--out")
    assert (tmp_path / "new" / "deeper").is_dir()


def test_directories_that_are_not_writable(tmp_path, monkeypatch):
    asked = []

    def access(path, mode):  # root may write anywhere
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)
    for path in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match=f"^--out: {tmp_path} cannot be written to"):
            check_directory(path, "--out")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2
    check_directory(tmp_path, "--cache", to_write=False)  # to be read is enough


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=f"^cannot write {tmp_path / 'a.json'}: Is a directory$"):
        write_text(tmp_path / "a.json", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        write_text(tmp_path / "file" / "b", "x")
    with pytest.raises(FileNotFoundError):  # told by those who know what was deleted
        write_text(tmp_path / "gone" / "b", "x")


def test_a_directory_of_before_a_flag_was_there(tmp_path):
    """The flag has its default there, and no other."""
    defaults = defaults_of(TrainConfig)
    flags = {**defaults, "train_data_dir": "pairs", "beta_dpo": 500.0}
    older = {name: value for name, value in flags.items() if name != "losers_one_in"}
    claim_directory(tmp_path, older, "--out", "a run", defaults)
    check_claim(tmp_path, flags, "--out", "a run", defaults)
    for changed, before in (({"losers_one_in": 2}, 1), ({"beta_dpo": 5000.0}, 500.0)):
        with pytest.raises(UserError, match=f"holds a run with --{min(changed)} {before}; give"):
            check_claim(tmp_path, {**flags, **changed}, "--out", "a run", defaults)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_any_new_one_has(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with written_beside(tmp_path / "one") as beside:
            beside.touch(0o600)  # as safetensors makes them
        (tmp_path / "many.tmp" / "unet").mkdir(parents=True)
        (tmp_path / "many.tmp" / "unet" / "two").touch(0o600)
        rename_complete(tmp_path / "many.tmp", tmp_path / "many")
    finally:
        os.umask(before)
    for file in (tmp_path / "one", tmp_path / "many" / "unet" / "two"):
        assert file.stat().st_mode & 0o777 == mode

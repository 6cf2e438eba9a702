"""Where the project's files lie; writing so that a kill at any moment leaves either the old file or
the new one, whole; keeping one directory to one set of flags."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError, first_line

PACKAGE = Path(__file__).resolve().parents[1]
# The checkout, where the project is run from one; else the folder that the package is installed in.
ROOT = PACKAGE.parent
IN_CHECKOUT = (ROOT / "scripts" / "recipes").is_dir()
# Suites are built into it, so it lies outside an installed package.
PROMPTS_DIR = (
    ROOT / "prompts"
    if IN_CHECKOUT
    else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdpo" / "prompts"
)
FLAGS_FILE = "flags.json"

_FULL = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+|No space left|File too large|quota exceeded",
    re.IGNORECASE,
)
# What a file cannot be written for where there is room.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EIO)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def program(path: str) -> list[str]:
    """Name the command that starts one of the project's programs; it finds the package where
    this process did.

    Args:
        path: the program's file in the checkout, e.g. "eval/score.py".
    """
    file = ROOT / path
    if IN_CHECKOUT and file.parent == ROOT:
        return [sys.executable, str(file)]
    # Of a file Python searches the directory alone, which of eval/ is not the package's.
    return [sys.executable, "-m", "sdpo.cli", "--here", file.stem]


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give the block a path to write to; rename that to `path` when it ends without an error.

    Raises:
        UserError: the disk is full, or the place cannot be written to; `path` is as it was.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        _open_as_usual(beside)
        os.replace(beside, path)
    except Exception as error:
        is_full = disk_is_full(error)
        if not is_full and not _cannot_be_written(beside, error):
            raise
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if is_full:
            raise UserError(full_disk(path.parent, error)) from error
        assert isinstance(error, OSError)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _open_as_usual(file: Path) -> None:
    """Give a new file the permissions that any has here: safetensors and Arrow leave some of theirs
    for their owner alone."""
    umask = os.umask(0o022)
    os.umask(umask)
    with suppress(OSError):  # a file system without permissions
        file.chmod(0o666 & ~umask)


def _cannot_be_written(beside: Path, error: Exception) -> bool:
    if not isinstance(error, OSError) or str(error.filename) != str(beside):
        return False
    return error.errno in _UNWRITABLE


def disk_is_full(error: BaseException) -> bool:
    """Say whether an error is a write that found no room, or a quota or size limit reached; torch
    and safetensors have errors of their own for it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return bool(_FULL.search(str(error)))


def full_disk(directory: Path, error: BaseException) -> str:
    """The sentence for `disk_is_full`."""
    return (
        f"cannot write to {directory} ({first_line(error)}): make room there, then run the same "
        "command again; what was there before is whole"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: beside its place, flushed to disk, then renamed."""
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole; what JSON does not know is written as text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def rename_complete(beside: Path, path: Path) -> None:
    """Flush every file of the directory `beside` to disk and rename it to `path`."""
    for file in beside.rglob("*"):
        if file.is_file():
            _open_as_usual(file)
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    os.rename(beside, path)


def replace_directory(beside: Path, path: Path) -> None:
    """Put the complete directory `beside` in the place of `path`, which may exist."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    rename_complete(beside, path)
    shutil.rmtree(old, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Compute a file's sha256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hub_sha256(path: Path) -> str | None:
    """Take the sha256 that a file's content should have from the name under which the hub's client
    keeps a large file; None for others. Nothing is read."""
    blob = path.resolve().name
    return blob if _SHA256.fullmatch(blob) else None


def check_directory(path: Path, flag: str, to_write: bool = True) -> None:
    """Refuse a path that is not a directory and cannot become one, or `to_write` none that can be
    written to.

    Raises:
        UserError: naming `flag`.
    """
    try:
        if path.exists():
            if not path.is_dir():
                raise UserError(f"{flag}: {path} exists and is not a directory")
            place = path if to_write else None
        else:
            place = next(parent for parent in path.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise UserError(f"{flag}: {path} cannot be a directory ({first_line(error)})") from None
    if place and not place.is_dir():
        raise UserError(f"{flag}: {path} cannot be made, since {place} is a file")
    if place and not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag}: {place} cannot be written to; give another {flag}")


def make_directory(path: Path, flag: str) -> None:
    """Make a directory and those above it, where they are not there.

    Raises:
        UserError: it cannot be made; names `flag`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: cannot make {path} ({error.strerror}); give another") from None


def claim_directory(
    out: Path,
    flags: dict[str, Any],
    flag: str,
    what: str,
    defaults: Mapping[str, Any],
) -> None:
    """Make a directory and note its flags there, if it was not begun with others.

    Args:
        flag: that named the directory.
        what: it holds, for the sentence: "an audit".
        defaults: which flags had that the program did not have yet when it was begun.

    Raises:
        UserError: it was begun with others; going on would mix two runs.
    """
    check_claim(out, flags, flag, what, defaults)
    make_directory(out, flag)
    write_json(out / FLAGS_FILE, flags)


def check_claim(
    out: Path,
    flags: dict[str, Any],
    flag: str,
    what: str,
    defaults: Mapping[str, Any],
) -> None:
    """Refuse a directory that `claim_directory` would refuse, and leave everything as it is.

    Raises:
        UserError: see there.
    """
    found = differences(out / FLAGS_FILE, flags, defaults) or {}
    changed = [f"--{name} {before}" for name, (before, _) in found.items() if name in flags]
    if changed:
        raise UserError(
            f"{flag}: {out} holds {what} with {', '.join(changed)}; give another {flag}, or "
            "delete it"
        )


def differences(
    path: Path, values: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, tuple[Any, Any]] | None:
    """Compare values with those that a JSON file keeps, which lets `defaults` stand for what it
    lacks.

    Returns:
        The names whose values differ, each with the file's value and this one (None where there is
        none); None where there is no such file, or none that can be read.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    now, then = (json.loads(json.dumps(of, default=str)) for of in (values, defaults or {}))
    both = {n: (before.get(n, then.get(n)), now.get(n)) for n in {**now, **before}}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}

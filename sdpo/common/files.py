"""Writing so that a kill at any moment leaves either the old file or the new one, whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

_SHA256 = re.compile(r"[0-9a-f]{64}")


def program(path: str) -> list[str]:
    """Name the command that starts one of the project's programs.

    Args:
        path: the program's file in the checkout, e.g. "eval/score.py"; where the package alone is
            installed, its command (`sdpo score`) is taken.
    """
    if IN_CHECKOUT:
        return [sys.executable, str(ROOT / path)]
    return [sys.executable, "-m", "sdpo.cli", "--here", Path(path).stem]


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where to write in the block; renamed to `path` when that ends without an error."""
    beside = path.with_name(path.name + ".tmp")
    yield beside
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename."""
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written whole."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def rename_complete(beside: Path, path: Path) -> None:
    """Flush every file of the directory `beside` to disk and rename it to `path`."""
    for file in beside.rglob("*"):
        if file.is_file():
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
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hub_sha256(path: Path) -> str | None:
    """The sha256 in the name under which the hub's client keeps a large file; None for others.

    It is what the content should have: nothing is read.
    """
    blob = path.resolve().name
    return blob if _SHA256.fullmatch(blob) else None

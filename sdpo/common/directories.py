"""Keeping one output directory to one set of flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import write_json

FLAGS_FILE = "flags.json"


def check_directory(path: Path, flag: str) -> None:
    """`path` may be missing, but nothing else than a directory.

    Raises:
        UserError: it is a file; `flag` named it.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag}: {path} exists and is not a directory")


def claim_directory(out: Path, flags: dict[str, Any], flag: str, what: str) -> None:
    """Make `out`, or make sure that what is there was begun with the same flags.

    Args:
        flag: that named the directory.
        what: it holds, for the sentence: "an audit".

    Raises:
        UserError: it was begun with others; going on would mix two runs.
    """
    check_claim(out, flags, flag, what)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FLAGS_FILE, flags)


def check_claim(out: Path, flags: dict[str, Any], flag: str, what: str) -> None:
    """As `claim_directory`, and leave everything as it is."""
    path = out / FLAGS_FILE
    flags = json.loads(json.dumps(flags, default=str))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"--{k} {before.get(k)}" for k in flags if before.get(k) != flags[k]]
        if changed:
            raise UserError(
                f"{flag}: {out} holds {what} with {', '.join(changed)}; give another {flag}, or "
                "delete it"
            )

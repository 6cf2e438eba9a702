"""Where checkpoints lie and which of them are complete; knows nothing of what is in them.

A checkpoint is written as `checkpoint-N.tmp` and renamed when everything in it is on disk, so a
directory named `checkpoint-N` is complete.
"""

from __future__ import annotations

import re
from pathlib import Path

STATE_FILE = "state.json"
UNET_FILE = "unet.pth"
EMA_FILE = "unet_ema.pth"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """The directory of the checkpoint after optimizer step `step`."""
    return output_dir / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """The N of a directory named checkpoint-N.

    Raises:
        ValueError: for another name.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named checkpoint-N")
    return int(match.group(1))


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint that was written to its end."""
    return _NAME.fullmatch(path.name) is not None and (path / STATE_FILE).is_file()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if is_complete(p)), key=step_of)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(output_dir)
    return found[-1] if found else None

"""Where checkpoints lie and which of them are complete; knows nothing of what is in them.

A checkpoint is written as `checkpoint-N.tmp` and renamed when everything in it is on disk, so a
directory named `checkpoint-N` is complete.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.config import RunConfig

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


def check_output_dir(run: RunConfig) -> None:
    """Check that --output_dir is usable and that --resume_from_checkpoint names something there.

    Raises:
        UserError: otherwise.
    """
    from sdpo.training.checkpoint_paths import (
        is_complete,
        latest_checkpoint,
        list_checkpoints,
        step_of,
    )

    output = Path(run.output_dir)
    check_directory(output, "--output_dir")
    wanted = run.resume_from_checkpoint
    if wanted == "none":
        if list_checkpoints(output):
            raise UserError(
                f"--resume_from_checkpoint none: {output} already holds checkpoints; give another "
                "--output_dir, or `latest` to go on from them"
            )
    elif wanted != "latest":
        named, newest = Path(wanted), latest_checkpoint(output)
        if not is_complete(named):
            raise UserError(
                f"--resume_from_checkpoint: {wanted} is not a complete checkpoint directory; give "
                "one like output/train/checkpoint-500, `latest` or `none`"
            )
        # They would be neither overwritten nor told apart from those of the new course.
        if newest is not None and step_of(newest) > step_of(named):
            raise UserError(
                f"--resume_from_checkpoint: {output} already holds {newest.name}, which is later "
                f"than {wanted}; give another --output_dir, or `latest` to go on from the newest"
            )

"""Checkpoints of a run: written beside and renamed, so that one that is there is whole."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdpo.common.errors import UserError
from sdpo.common.files import rename_complete, write_json
from sdpo.data.order import Place
from sdpo.models.loading import load_strictly, read_state_dict
from sdpo.training.checkpoint_paths import STATE_FILE, UNET_FILE, checkpoint_dir, list_checkpoints

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.pt"
# A checkpoint made under other values of these is of another run.
SAME_RUN = (
    "train_method",
    "dspo_form",
    "sdxl",
    "seed",
    "use_adafactor",
    "use_8bit_adam",
    "streaming",
    "choice_model",
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
    "use_dora",
    "use_ema",
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and the next place in its data."""

    step: int
    place: Place


def save_checkpoint(
    output_dir: Path,
    progress: Progress,
    unet: dict[str, torch.Tensor] | Callable[[], dict[str, torch.Tensor]],
    training: dict[str, Any],
    args: argparse.Namespace,
    limit: int | None,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write `checkpoint-N/` (by one process alone) and delete what is beyond `limit`.

    Args:
        unet: the plain state dict, saved as unet.pth, or what gives it (asked only where the
            checkpoint is not there yet).
        training: state dicts of optimizer, scheduler and, in fp16, gradient scaler.
        write_more: writes further files into the directory that it is given.
    """
    final = checkpoint_dir(output_dir, progress.step)
    if final.exists():
        return final
    beside = final.with_name(final.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    state_dict = unet() if callable(unet) else unet
    plain = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
    torch.save(plain, beside / UNET_FILE)
    if write_more is not None:
        write_more(beside)
    torch.save(training, beside / OPTIMIZER_FILE)
    state = {"step": progress.step, "place": list(progress.place), "args": vars(args)}
    write_json(beside / STATE_FILE, state)
    rename_complete(beside, final)
    log.info("saved %s", final)
    if limit is not None:
        for old in list_checkpoints(output_dir)[:-limit]:
            _remove(old)
    return final


def _remove(path: Path) -> None:
    # Renamed first: a kill half-way through must not leave something that looks complete.
    doomed = path.with_name(path.name + ".tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_unfinished(output_dir: Path) -> None:
    """Delete what a killed run left half-written."""
    for path in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_progress(
    path: Path,
    args: argparse.Namespace,
    flag: str = "--resume_from_checkpoint",
    instead: str = "give another --output_dir, or the same flag",
) -> Progress:
    """Where a checkpoint stands, checked to be of the same run.

    Args:
        flag: the one that named the checkpoint, and `instead` what to do if it does not fit.

    Raises:
        UserError: it was made with other flags than a resumed run can have.
    """
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    now, then = vars(args), state["args"]
    for name in SAME_RUN:
        # A flag that the program did not have yet was off.
        if (then.get(name) or None) != (now[name] or None):
            raise UserError(
                f"{flag}: {path} was made with --{name} {then.get(name)}, this run has "
                f"{now[name]}; {instead}"
            )
    changed = [k for k in now if k in then and then[k] != now[k] and k not in _MAY_DIFFER]
    if changed:
        changes = ", ".join(f"--{k} {then[k]} -> {now[k]}" for k in changed)
        log.warning("%s %s: flags that were others then: %s", flag, path.name, changes)
    return Progress(state["step"], Place(*state["place"]))


_MAY_DIFFER = {"resume_from_checkpoint", "max_train_steps", "num_train_epochs", "output_dir"}


def load_unet(path: Path, unet: torch.nn.Module, name: str = UNET_FILE) -> None:
    """Load a checkpoint's UNet, its file `name`, in place.

    Raises:
        UserError: it does not fit.
    """
    load_strictly(unet, read_state_dict(path / name), str(path / name))


def load_training(path: Path) -> dict[str, Any]:
    """The state dicts that `save_checkpoint` was given as `training`.

    Raises:
        UserError: unreadable.
    """
    try:
        return torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path / OPTIMIZER_FILE}: {error}") from None

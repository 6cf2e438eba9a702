"""The base that a run of train.py was trained from, for a UNet that lies in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.models.checks import BASE_FLAG
from sdpo.models.locations import HUB_ID
from sdpo.training.runlog import read_config

_LEVELS = 3  # RUN/checkpoint-N/pipeline/unet
_VAE = "pretrained_vae_model_name_or_path"
_PLACES = ("pretrained_model_name_or_path", _VAE, "single_file_config")


def base_of_run(unet: str) -> dict[str, Any]:
    """Take base, VAE, configurations and revision from the settings of the run that a UNet lies in.

    Relative paths are meant from where the run was started, as far as its --output_dir tells, or
    from here.

    Returns:
        Values by the flags' names; {} where it lies in no run.

    Raises:
        UserError: one of them is a path that is not there.
    """
    path = Path(unet)
    if not path.exists():
        return {}
    path = path.resolve()
    for folder in [path, *path.parents][: _LEVELS + 1]:
        args = _args(folder)
        if args:
            start = _start(folder, args.get("output_dir"))
            found = {name: _place(args.get(name), start, unet) for name in _PLACES}
            found[_VAE] = found[_VAE] or "base"
            return {**found, "revision": args.get("revision"), "sdxl": bool(args.get("sdxl"))}
    return {}


def _args(folder: Path) -> dict[str, Any]:
    """A run's flags; {} of what has no run's config.json."""
    try:
        args = read_config(folder)["args"]
        return args if args["pretrained_model_name_or_path"] else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _start(run: Path, output_dir: str | None) -> Path:
    """Where a run was started: where its --output_dir is relative to, if it was relative."""
    parts = Path(output_dir or "/").parts
    within = len(run.parts) - len(parts)
    return Path(*run.parts[:within]) if run.parts[within:] == parts else Path.cwd()


def _place(value: str | None, start: Path, unet: str) -> str | None:
    if not value:
        return None
    if start != Path.cwd() and (start / value).exists():
        return str(start / value)
    if Path(value).exists() or HUB_ID.fullmatch(value):
        return value
    raise UserError(
        f"--unet: {unet} was trained from {value}, which is not there; give {BASE_FLAG}"
    )

"""The checks of a run's settings that look at this machine: files, directories, packages, and how
the run was launched. All of them are cheap and need no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.config import RunConfig, TrainConfig
from sdpo.config.model import REFERENCE_FLAG
from sdpo.data.local import check_cache_location, check_data_location
from sdpo.models.kind import settle
from sdpo.models.locations import check_model_location
from sdpo.training.checkpoint_paths import check_output_dir
from sdpo.training.hub_checks import check_hub
from sdpo.training.reference_cache.key import check_key, key_of_flags
from sdpo.training.sharding import launched_sharding

C = TypeVar("C", bound=TrainConfig)


def check_places(config: C) -> C:
    """Check all that a run names: base, data, cache, output directory, packages, launcher.

    Returns:
        The settings with what they leave to the base filled in; with --check_only that of a base
        on the hub is not asked for.

    Raises:
        UserError: naming the flag and what would be right.
    """
    for name in ("use_8bit_adam", "quantize_base"):
        if config.flags()[name]:
            check_bitsandbytes(name)
    _check_tracker(config.run)
    check_model_location(config.model)
    check_data_location(config.data)
    check_cache_location(config.data)
    check_output_dir(config.run)
    check_hub(config.run, Path(config.run.output_dir))
    launched_sharding(config)
    config = settle(config)
    _check_reference_cache(config)
    return config


def check_bitsandbytes(name: str) -> None:
    """Refuse a flag whose package is not installed.

    Raises:
        UserError: naming both.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"--{name} needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave the flag out"
        )


def _check_reference_cache(config: TrainConfig) -> None:
    if config.model.cache_reference is None:
        return
    directory = Path(config.model.cache_reference)
    check_directory(directory, REFERENCE_FLAG, to_write=False)  # one that is there may be complete
    if config.data.resolution is not None:  # else that of a base which was not asked
        check_key(directory, key_of_flags(config))


def _check_tracker(run: RunConfig) -> None:
    # tensorboard is among the requirements, which the scripts install after --check_only.
    if run.report_to in ("none", "all") or (run.report_to == "tensorboard" and run.check_only):
        return
    packages = {"tensorboard": ("tensorboard", "tensorboardX")}.get(run.report_to, (run.report_to,))
    if not any(map(find_spec, packages)):
        raise UserError(
            f"--report_to {run.report_to}: the package {packages[0]} is not installed: pip install "
            f"{packages[0]}, or give --report_to none"
        )

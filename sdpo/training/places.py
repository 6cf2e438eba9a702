"""The checks of a run's settings that look at this machine: files, directories, packages, and how
the run was launched. All of them are cheap and need no torch."""

from __future__ import annotations

from importlib.util import find_spec

from sdpo.common.errors import UserError
from sdpo.config import TrainConfig
from sdpo.data.local import check_cache_location, check_data_location
from sdpo.models.locations import check_model_location
from sdpo.training.checkpoint_paths import check_output_dir
from sdpo.training.sharding import launched_sharding


def check_places(config: TrainConfig) -> None:
    """Check all that a run names: base, data, cache, output directory, packages, launcher.

    Raises:
        UserError: naming the flag and what would be right.
    """
    if config.optim.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise UserError(
            "--use_8bit_adam needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave the flag out"
        )
    check_model_location(config.model)
    check_data_location(config.data)
    check_cache_location(config.data)
    check_output_dir(config.run)
    launched_sharding(config)

"""Encode the images and captions that a training run needs, ahead of it:

    python -m sdpo.data.latents --cache_dir_latents DIR ... (and the run's flags, as for train.py)

Several processes share the work (scripts/data/cache_latents.sh starts them); a call that was killed
goes on where it was. train.py with the same --cache_dir_latents then finds the cache there.
"""

from __future__ import annotations

import sys

from sdpo.common.errors import UserError, run_main
from sdpo.config import TrainConfig, parse_train
from sdpo.config.data import CACHE_FLAG
from sdpo.data.local import check_cache_location, check_data_location
from sdpo.models.kind import settle
from sdpo.models.locations import check_model_location


def parse(argv: list[str]) -> TrainConfig:
    """Parse train.py's flags, of which those of model, data, resolution and precision count, and
    check the places that they name.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse_train(argv, "python -m sdpo.data.latents", __doc__)
    check_model_location(config.model)
    check_data_location(config.data)
    check_cache_location(config.data)
    if config.data.cache_dir_latents is None:
        raise UserError(f"{CACHE_FLAG} is missing: where shall the cache be?")
    return settle(config)


def main() -> int:
    """Encode what is missing, say what is there."""
    config = parse(sys.argv[1:])
    if config.run.check_only:
        return 0

    from sdpo.common.precision import check_precision
    from sdpo.common.processes import start
    from sdpo.data.latents.prepare import prepare_cache
    from sdpo.data.source import open_pairs
    from sdpo.models import open_base

    accelerator = start()
    check_precision("--mixed_precision", config.optim.mixed_precision, accelerator.device)
    family, source = open_base(config)
    with accelerator.local_main_process_first():
        pairs = open_pairs(config.data, config.run.seed)
    cache = prepare_cache(pairs, config, family, source, accelerator)
    if accelerator.is_main_process:
        print(f"{config.data.cache_dir_latents}: {cache.summary}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_main(main, "sdpo.cache")

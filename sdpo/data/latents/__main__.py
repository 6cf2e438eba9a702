"""Encode the images and captions that a training run needs, ahead of it:

    python -m sdpo.data.latents --cache_dir_latents DIR ... (and the run's flags, as for train.py)

Several processes share the work (scripts/data/cache_latents.sh starts them); a call that was killed
goes on where it was. train.py with the same --cache_dir_latents then finds the cache there.
"""

from __future__ import annotations

import argparse
import sys

from sdpo.args import build_parser, parse_args
from sdpo.common.errors import UserError, run_main
from sdpo.data.latents.flags import CACHE_FLAG

CHECK_ONLY = "--check_only"


def parse_cache_args(argv: list[str]) -> argparse.Namespace:
    """train.py's flags, of which those of model, data, resolution and precision count.

    Raises:
        UserError: naming the flag and what would be right.
    """
    parser = build_parser("python -m sdpo.data.latents", __doc__)
    parser.add_argument(CHECK_ONLY, action="store_true", help="check the flags, no more")
    args = parse_args(argv, parser)
    if args.cache_dir_latents is None:
        raise UserError(f"{CACHE_FLAG} is missing: where shall the cache be?")
    return args


def main() -> int:
    """Encode what is missing, say what is there."""
    args = parse_cache_args(sys.argv[1:])
    if args.check_only:
        return 0

    from sdpo.common.precision import check_precision
    from sdpo.common.processes import start
    from sdpo.data.latents.prepare import prepare_cache
    from sdpo.data.source import open_pairs
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource

    accelerator = start()
    check_precision("--mixed_precision", args.mixed_precision, accelerator.device)
    family, source = get_family(args.sdxl), ModelSource.from_args(args)
    family.load_unet_config(source)
    with accelerator.local_main_process_first():
        pairs = open_pairs(args)
    cache = prepare_cache(pairs, args, family, source, accelerator)
    if accelerator.is_main_process:
        print(f"{args.cache_dir_latents}: {cache.summary}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_main(main, "sdpo.cache")

"""Generate every suite and score it: generate.py and score.py in one go.

All flags are checked, and what the scorers need is fetched, before the first image is made. Killed
at any point, the same command makes and scores only what is missing.
"""

from __future__ import annotations

import argparse
import sys

from sdpo.common.cli import Parser
from sdpo.evaluation.generate.config import add_generation_flags, check_generation_flags
from sdpo.evaluation.generate.run import check_suites, generate, read_suites
from sdpo.evaluation.score.config import add_scoring_flags, check_scoring_flags, score_options
from sdpo.evaluation.score.run import read_manifests, score
from sdpo.evaluation.score.scorers import PUBLISHED


def build_parser() -> argparse.ArgumentParser:
    """The flags of generate.py and score.py together."""
    parser = Parser("evaluate.py", __doc__)
    add_generation_flags(parser)
    add_scoring_flags(parser, "--score_batch_size")
    parser.add_argument("--check_only", action="store_true", help="check the flags, no more")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """evaluate.py's flags, checked; `scorer_weights` holds --weights taken apart.

    Raises:
        UserError: naming the flag and what would be right.
    """
    args = build_parser().parse_args(argv)
    check_generation_flags(args)
    args.scorer_weights = check_scoring_flags(args)
    return args


def main() -> int:
    """Check, generate, score."""
    args = parse_args(sys.argv[1:])
    check_suites(args)
    if args.check_only:
        return 0

    from accelerate.utils.memory import clear_device_cache

    from sdpo.common.processes import start
    from sdpo.evaluation.score.scoring import fetch_weights

    accelerator = start()
    suites = read_suites(args, accelerator)
    scorers = args.scorers or list(PUBLISHED)
    options = score_options(args, args.scorer_weights)
    with accelerator.local_main_process_first():
        fetch_weights(scorers, options)
    paths = generate(args, suites, accelerator)
    # The generating models are gone before scorers come.
    clear_device_cache(garbage_collection=True)
    score(read_manifests(paths), scorers, options, args.outdir, accelerator)
    accelerator.end_training()
    return 0

"""Generate every suite and score it: generate.py and score.py in one go.

All flags are checked, and what the scorers need is fetched, before the first image is made. Killed
at any point, the same command makes and scores only what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sdpo.common.flags import flag, parse
from sdpo.evaluation.generate.config import GenerationConfig, check_suites, fill_in
from sdpo.evaluation.generate.run import generate, read_suites
from sdpo.evaluation.score.config import ScoringConfig, check_scoring
from sdpo.evaluation.score.run import read_manifests, score


@dataclass(frozen=True)
class _ScoringConfig(ScoringConfig):
    """How images are scored; the flag of generation's batch size has the short name."""

    batch_size: int = flag(32, "images scored at a time", metavar="N", name="score_batch_size")


@dataclass(frozen=True)
class EvaluateConfig:
    """The flags of generate.py and score.py together."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)
    scoring: _ScoringConfig = field(default_factory=_ScoringConfig)
    check_only: bool = flag(False, "check the flags, no more")


def parse_args(argv: Sequence[str]) -> EvaluateConfig:
    """Parse evaluate.py's command line, check it and fill in what depends on other flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(EvaluateConfig, argv, "evaluate.py", __doc__)
    check_scoring(config.scoring)
    return replace(config, generation=fill_in(config.generation))


def main() -> int:
    """Check, generate, score; returns the exit code."""
    config = parse_args(sys.argv[1:])
    check_suites(config.generation)
    if config.check_only:
        return 0

    from accelerate.utils.memory import clear_device_cache

    from sdpo.common.processes import start
    from sdpo.evaluation.score.scoring import fetch_weights

    accelerator = start()
    suites = read_suites(config.generation, accelerator)
    scorers, options = config.scoring.names, config.scoring.options(config.generation.cache_dir)
    with accelerator.local_main_process_first():
        fetch_weights(scorers, options)
    paths = generate(config.generation, suites, accelerator)
    # The generating models are gone before scorers come.
    clear_device_cache(garbage_collection=True)
    score(read_manifests(paths), scorers, options, config.generation.outdir, accelerator)
    accelerator.end_training()
    return 0

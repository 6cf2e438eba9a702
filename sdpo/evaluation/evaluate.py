"""Generate every suite and score it: generate.py and score.py in one go.

All flags are checked, and what the scorers need is fetched, before the first image is made. Killed
at any point, the same command makes and scores only what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sdpo.common.files import make_directory
from sdpo.common.flags import flag, parse
from sdpo.evaluation.generate.config import GenerationConfig, check_suites, fill_in
from sdpo.evaluation.generate.run import generate, planned, read_suites
from sdpo.evaluation.generate.suites import Suite
from sdpo.evaluation.score.config import ScoreOptions, ScoringConfig, check_scoring
from sdpo.evaluation.score.run import read_manifests, score

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sdpo.evaluation.score.beside import Beside

LOG_FILE = "score_beside.log"


@dataclass(frozen=True)
class _ScoringConfig(ScoringConfig):
    """How images are scored; the flag of generation's batch size has the short name."""

    batch_size: int = flag(32, "images scored at a time", metavar="N", name="score_batch_size")


@dataclass(frozen=True)
class EvaluateConfig:
    """The flags of generate.py and score.py together."""

    generation: GenerationConfig = field(default_factory=GenerationConfig)
    scoring: _ScoringConfig = field(default_factory=_ScoringConfig)
    score_beside: bool = flag(
        False,
        "score images while they are made, by a process of its own on --device, which holds all "
        "scorers at once",
    )
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
    with _beside(config, suites, options, accelerator) as beside:
        begun = beside.begun if beside else None
        paths = generate(config.generation, suites, accelerator, begun)
        # The generating models are gone before scorers come.
        clear_device_cache(garbage_collection=True)
    if config.score_beside:
        accelerator.wait_for_everyone()
        # What may be left is for every process's own device, as without it.
        options = replace(options, how=replace(options.how, device=None))
    score(read_manifests(paths), scorers, options, config.generation.outdir, accelerator)
    accelerator.end_training()
    return 0


def _beside(
    config: EvaluateConfig, suites: list[Suite], options: ScoreOptions, accelerator: Accelerator
) -> AbstractContextManager[Beside | None]:
    """Start the process of --score_beside from the main one.

    Raises:
        UserError: there is no such --device.
    """
    if not config.score_beside:
        return nullcontext()
    from sdpo.common.processes import device_of, on_main
    from sdpo.evaluation.score.beside import Beside

    on_main(accelerator, lambda: device_of(options.how.device, accelerator))
    if not accelerator.is_main_process:
        return nullcontext()
    outdir = config.generation.outdir
    make_directory(outdir, "--outdir")
    manifests = [planned(config.generation, suite) for suite in suites]
    return Beside(manifests, config.scoring.names, options, outdir / LOG_FILE)

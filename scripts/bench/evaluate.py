"""Time an evaluation whose images are scored while they are made, by a process of its own
(--score_beside), against one that scores them afterwards.

    bash scripts/bench/evaluate.sh [--images 64] [--steps 50]

eval/evaluate.py as a program, on the tiny SD1.5 and, without --weights, with scorers of small
random weights (scripts/parity): scoring has another share of the work than with true models, which
scripts/bench/cost_model.py computes. Both ways take turns, forwards and backwards, each time from
nothing. OMP_NUM_THREADS=1 leaves the second of two cores to the second process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.bench import common
from scripts.bench.score import write_weights
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, at_most, flag, flat, parse
from sdpo.evaluation.score.scorers import PUBLISHED

AFTER, BESIDE = "scored afterwards", "scored beside"
ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    base: Path = flag(common.TINY_MODEL, "base in diffusers layout", metavar="DIR")
    images: int = flag(
        64, "images of a turn, of the suite tinyworld", metavar="N", check=(ONE, at_most(128))
    )
    resolution: int = flag(64, "their side", metavar="PX", check=at_least(8))
    steps: int = flag(10, "sampling steps", metavar="N", check=ONE)
    scorers: tuple[str, ...] = flag(tuple(PUBLISHED), "which", metavar="NAME", shown="all five")
    weights: tuple[str, ...] = flag((), "as of eval/score.py", metavar="NAME=PATH", record=False)
    turns: int = flag(3, "turns of each way", check=ONE)
    out: Path = flag(Path("output/bench/evaluate.json"), "the figures", record=False)


def evaluate(argv: list[str], outdir: Path) -> None:
    """Run eval/evaluate.py once, from nothing.

    Raises:
        UserError: it failed, with its last line.
    """
    shutil.rmtree(outdir, ignore_errors=True)
    command = [sys.executable, "-m", "eval.evaluate", *argv, "--outdir", str(outdir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    if done.returncode or "ended early" in done.stdout:
        raise UserError(
            f"evaluate.py failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
        )


def main() -> int:
    """Run, print, write."""
    options = parse(Options, sys.argv[1:], "evaluate.py", __doc__)
    common.check_out(options.out)
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    with common.scratch() as work:
        weights = options.weights or write_weights(work, options.scorers)
        flags = {
            "unet": "base",
            "pretrained_model_name_or_path": options.base.resolve(),
            "suites": "tinyworld",
            "limit": options.images,
            "resolution": options.resolution,
            "steps": options.steps,
            "dtype": "fp32",
            "scorers": options.scorers,
        }
        argv = as_argv(flags | ({"weights": weights} if weights else {}))
        found = common.take_turns(
            {
                way: partial(common.seconds_of, partial(evaluate, argv + more, work / "out"))
                for way, more in ((AFTER, []), (BESIDE, ["--score_beside"]))
            },
            options.turns,
        )
    ways = {
        way: {
            "seconds": common.spread(seconds),
            "to_afterwards": common.ratios(seconds, found[AFTER]),
        }
        for way, seconds in found.items()
    }
    common.print_table(
        ("way", "time / afterwards", "quartiles", "seconds"),
        [
            (
                way,
                f"{of['to_afterwards']['median']:.2f}",
                common.quartiles(of["to_afterwards"], ".2f"),
                f"{of['seconds']['median']:.1f}",
            )
            for way, of in ways.items()
        ],
    )
    common.write_result(options.out, "evaluate.py", {"settings": flat(options), "ways": ways})
    return 0


if __name__ == "__main__":
    run_main(main, "evaluate.py")

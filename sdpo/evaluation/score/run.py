"""Score generated images: `python eval/score.py MANIFEST.json ...`, on several devices
`accelerate launch eval/score.py ...`.

Beside each manifest, <stem>_scores.parquet and .json keep every image's scores, so a second call
computes only what is missing; means go to summary.json, summary.csv and summary.md in --outdir.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError
from sdpo.common.flags import flag, parse
from sdpo.evaluation.generate.manifest import Manifest, read_manifest
from sdpo.evaluation.score.config import ScoreOptions, ScoringConfig, check_scoring

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class ScoreConfig:
    """score.py's flags; `parse_args` fills in outdir."""

    manifests: tuple[Path, ...] = flag(
        (),
        "as generate.py writes them",
        metavar="MANIFEST.json",
        positional=True,
        required=True,
    )
    outdir: Path = flag(None, "where the summary goes", shown="the first manifest's place")
    cache_dir: str | None = flag(None, "where downloads are kept", metavar="DIR")
    scoring: ScoringConfig = field(default_factory=ScoringConfig)


def parse_args(argv: Sequence[str]) -> ScoreConfig:
    """Parse score.py's command line and check it.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(ScoreConfig, argv, "score.py", __doc__)
    check_scoring(config.scoring)
    return replace(config, outdir=config.outdir or config.manifests[0].parent)


def main() -> int:
    """Score what is missing, print and write the means; returns the exit code."""
    config = parse_args(sys.argv[1:])
    manifests = read_manifests(config.manifests)

    from sdpo.common.processes import start

    accelerator = start()
    options = config.scoring.options(config.cache_dir)
    score(manifests, config.scoring.names, options, config.outdir, accelerator)
    accelerator.end_training()
    return 0


def read_manifests(paths: Sequence[Path]) -> list[Manifest]:
    """Read and check several manifests.

    Raises:
        UserError: one cannot be read, or is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"a manifest is given twice: {' '.join(map(str, paths))}")
    return [read_manifest(path) for path in paths]


def score(
    manifests: list[Manifest],
    scorers: list[str],
    options: ScoreOptions,
    outdir: Path,
    accelerator: Accelerator,
) -> None:
    """Score manifests; the main process prints the means and writes them to `outdir`."""
    from sdpo.evaluation.score.scoring import score_manifests
    from sdpo.evaluation.score.summary import grid, print_grid, summarise, write_summary

    tables = score_manifests(manifests, scorers, options, accelerator)
    if not accelerator.is_main_process:
        return
    rows = summarise(tables, scorers)
    about = {name: tables[0].about[name] for name in scorers}
    write_summary(outdir, rows, {"manifests": [str(m.path) for m in manifests], "scorers": about})
    print_grid(grid(rows))
    print(f"\nwrote {outdir / 'summary.json'}, summary.csv and summary.md")

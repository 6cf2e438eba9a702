"""Score generated images: `python eval/score.py MANIFEST.json ...`, on several devices
`accelerate launch eval/score.py ...`.

Beside each manifest, <stem>_scores.parquet and .json keep every image's scores, so a second call
computes only what is missing; means go to summary.json, summary.csv and summary.md in --outdir.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.cli import Parser
from sdpo.common.errors import UserError
from sdpo.evaluation.generate.manifest import Manifest, read_manifest
from sdpo.evaluation.score.config import add_scoring_flags, check_scoring_flags, score_options
from sdpo.evaluation.score.scorers import PUBLISHED

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sdpo.evaluation.score.scoring import ScoreOptions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """score.py's flags; `scorer_weights` holds --weights taken apart.

    Raises:
        UserError: naming the flag and what would be right.
    """
    parser = Parser("score.py", __doc__)
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST.json")
    parser.add_argument(
        "--outdir", type=Path, help="where the summary goes (default: the first manifest's place)"
    )
    parser.add_argument("--cache_dir", metavar="DIR", help="where downloads are kept")
    add_scoring_flags(parser)
    args = parser.parse_args(argv)
    args.scorer_weights = check_scoring_flags(args)
    args.outdir = args.outdir or args.manifests[0].parent
    return args


def main() -> int:
    """Score what is missing, print and write the means."""
    args = parse_args(sys.argv[1:])
    manifests = read_manifests(args.manifests)

    from sdpo.common.processes import start

    accelerator = start()
    scorers = args.scorers or list(PUBLISHED)
    score(manifests, scorers, score_options(args, args.scorer_weights), args.outdir, accelerator)
    accelerator.end_training()
    return 0


def read_manifests(paths: list[Path]) -> list[Manifest]:
    """Read and check them all.

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
    """Score, and on the main process print the means and write them to `outdir`."""
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

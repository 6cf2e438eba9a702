"""compare.py's flags, and every check on them and on the files they name that needs no scores."""

from __future__ import annotations

import argparse
import os
import re
from itertools import combinations
from pathlib import Path

from sdpo.common.cli import Parser, at_least
from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.evaluation.compare.alignment import ALIGNMENTS, align
from sdpo.evaluation.compare.results import TIE
from sdpo.evaluation.compare.statistics import TIES
from sdpo.evaluation.generate.manifest import Manifest, read_manifest
from sdpo.evaluation.score.config import add_scoring_flags, check_scoring_flags

_SCORE_SUFFIXES = ("_scores.parquet", "_scores.json")


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The program's flags; those of the published script keep their names."""
    parser = Parser("compare.py", description)
    add = parser.add_argument
    add("--json_a", metavar="PATH", help="manifest of model A (or its image folder or score file)")
    add("--json_b", metavar="PATH", help="the same of model B")
    add("--label_a", help="name of model A (default: the manifest's, or its folder's)")
    add("--label_b", help="name of model B")
    add(
        "--json",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="two or more models with their names, instead of --json_a and --json_b",
    )
    add("--outdir", metavar="DIR", help="default: output/compare/<label_a>_vs_<label_b>")
    add("--ties", choices=TIES, default="half", help="what a tie is for the win rate (half)")
    add("--align", choices=ALIGNMENTS, default="prompt", help="what makes a pair (prompt)")
    add("--seed", type=int, default=0, help="of the bootstrap (0)")
    add("--inline_images", action="store_true", help="put thumbnails into report.html itself")
    add("--cache_dir", metavar="DIR", help="where downloads are kept")
    # Scores that are there are used as they are; the rest is computed with these.
    add_scoring_flags(parser)
    return parser


def parse_args(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """Flags, with `manifests` (label to manifest, in order), `outdir` and `scorer_weights` made of
    them.

    Raises:
        UserError: a flag or a file that it names is not usable; two labels are equal; two models
            cannot be aligned.
    """
    args = build_parser(description).parse_args(argv)
    args.scorer_weights = check_scoring_flags(args)
    at_least(args, 0, "seed")
    args.manifests = _read_manifests(args)
    for a, b in combinations(args.manifests.values(), 2):
        align(a, b, args.align)
    default = Path("output/compare") / folder_name("_vs_".join(args.manifests))
    args.outdir = Path(os.path.expanduser(args.outdir)) if args.outdir else default
    _check_outdir(args.outdir)
    return args


def _read_manifests(args: argparse.Namespace) -> dict[str, Manifest]:
    """Label to manifest, of either way to name them."""
    if args.json:
        if args.json_a or args.json_b or args.label_a or args.label_b:
            raise UserError("give either --json or --json_a and --json_b with their labels")
        labels, paths, flags = [], [], ["--json"] * len(args.json)
        for text in args.json:
            label, equals, path = text.partition("=")
            if not (label.strip() and equals and path):
                raise UserError(f"--json must be NAME=PATH, got {text!r}")
            labels.append(label.strip())
            paths.append(path)
        if len(paths) < 2:
            raise UserError("--json needs at least two models to compare")
    elif args.json_a and args.json_b:
        labels, paths = [args.label_a, args.label_b], [args.json_a, args.json_b]
        flags = ["--json_a", "--json_b"]
    else:
        raise UserError("give --json_a and --json_b, or --json NAME=PATH NAME=PATH ...")
    found = [_manifest_path(path, flag) for path, flag in zip(paths, flags, strict=True)]
    stems, folders = [p.stem for p in found], [p.resolve().parent.name for p in found]
    defaults = stems if len(set(stems)) == len(stems) else folders
    labels = [label or default for label, default in zip(labels, defaults, strict=True)]
    if len(set(labels)) < len(labels) or TIE in labels or not all(map(str.strip, labels)):
        flag = "--json NAME=PATH" if args.json else "--label_a and --label_b"
        raise UserError(
            f"{flag}: the models need names that differ and are not {TIE!r}, got "
            f"{', '.join(map(repr, labels))}"
        )
    return {label: read_manifest(path) for label, path in zip(labels, found, strict=True)}


def _manifest_path(given: str, flag: str) -> Path:
    """The manifest itself, or that of the score file or image folder `given`."""
    path = Path(os.path.expanduser(given))
    for suffix in _SCORE_SUFFIXES:
        if path.name.endswith(suffix):
            path = path.with_name(path.name.removesuffix(suffix) + ".json")
    if path.is_dir():
        path = Path(f"{os.path.abspath(path)}.json")
    if not path.is_file():
        raise UserError(f"{flag} {given}: there is no manifest {path}")
    return path


def _check_outdir(outdir: Path) -> None:
    check_directory(outdir, "--outdir")
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir: cannot make {outdir}: {error.strerror}") from None
    if not os.access(outdir, os.W_OK):
        raise UserError(f"--outdir: {outdir} cannot be written to")


def folder_name(label: str) -> str:
    """A label without what does not belong into a folder's name."""
    return re.sub(r"[^\w.-]+", "_", label).strip("._") or "models"

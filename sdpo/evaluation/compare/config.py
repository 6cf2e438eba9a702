"""compare.py's flags, and every check on them and on the files they name that needs no scores."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.common.flags import at_least, flag, parse
from sdpo.evaluation.compare.alignment import ALIGNMENTS, align
from sdpo.evaluation.compare.results import TIE
from sdpo.evaluation.compare.statistics import TIES
from sdpo.evaluation.generate.manifest import Manifest, read_manifest
from sdpo.evaluation.score.config import ScoringConfig, check_scoring

_SCORE_SUFFIXES = ("_scores.parquet", "_scores.json")


@dataclass(frozen=True)
class CompareConfig:
    """compare.py's flags; those of the published script keep their names."""

    json_a: str | None = flag(
        None,
        "manifest of model A (or its image folder, score file, or a folder of one manifest)",
        metavar="PATH",
    )
    json_b: str | None = flag(None, "the same of model B", metavar="PATH")
    label_a: str | None = flag(None, "name of model A", shown="the manifest's, or its folder's")
    label_b: str | None = flag(None, "name of model B")
    json: tuple[str, ...] = flag(
        (),
        "two or more models with their names, instead of --json_a and --json_b",
        metavar="NAME=PATH",
        extend=True,
    )
    outdir: Path = flag(
        None,
        "where everything is written",
        metavar="DIR",
        shown="output/compare/<label_a>_vs_<label_b>",
        expand=True,
    )
    ties: str = flag("half", "what a tie is for the win rate", choices=TIES)
    align: str = flag("prompt", "what makes a pair", choices=ALIGNMENTS)
    seed: int = flag(0, "of the bootstrap", check=at_least(0))
    inline_images: bool = flag(False, "put thumbnails into report.html itself")
    cache_dir: str | None = flag(None, "where downloads are kept", metavar="DIR")
    # Scores that are there are used as they are; the rest is computed with these.
    scoring: ScoringConfig = field(default_factory=ScoringConfig)


def parse_args(
    argv: Sequence[str], about: str | None = None
) -> tuple[CompareConfig, dict[str, Manifest]]:
    """Parse compare.py's command line and read the manifests it names, by label.

    Raises:
        UserError: a flag or a file that it names is not usable; two labels are equal; two models
            cannot be aligned.
    """
    config = parse(CompareConfig, argv, "compare.py", about)
    check_scoring(config.scoring)
    manifests = _read_manifests(config)
    for a, b in combinations(manifests.values(), 2):
        align(a, b, config.align)
    default = Path("output/compare") / folder_name("_vs_".join(manifests))
    config = replace(config, outdir=config.outdir or default)
    _check_outdir(config.outdir)
    return config, manifests


def _read_manifests(config: CompareConfig) -> dict[str, Manifest]:
    """Label to manifest, of either way to name them."""
    labels: list[str | None]
    if config.json:
        if config.json_a or config.json_b or config.label_a or config.label_b:
            raise UserError("give either --json or --json_a and --json_b with their labels")
        split = [text.partition("=") for text in config.json]
        for text, (label, _, path) in zip(config.json, split, strict=True):
            if not (label.strip() and path):
                raise UserError(f"--json must be NAME=PATH, got {text!r}")
        if len(split) < 2:
            raise UserError("--json needs at least two models to compare")
        labels, paths = [label.strip() for label, _, _ in split], [path for _, _, path in split]
        flags = ["--json"] * len(paths)
    elif config.json_a and config.json_b:
        labels, paths = [config.label_a, config.label_b], [config.json_a, config.json_b]
        flags = ["--json_a", "--json_b"]
    else:
        raise UserError("give --json_a and --json_b, or --json NAME=PATH NAME=PATH ...")
    found = [_manifest_path(*pair) for pair in zip(paths, flags, strict=True)]
    stems, folders = [p.stem for p in found], [p.resolve().parent.name for p in found]
    defaults = stems if len(set(stems)) == len(stems) else folders
    names = [label or default for label, default in zip(labels, defaults, strict=True)]
    if len(set(names)) < len(names) or TIE in names or not all(map(str.strip, names)):
        given = "--json NAME=PATH" if config.json else "--label_a and --label_b"
        raise UserError(
            f"{given}: the models need names that differ and are not {TIE!r}, got "
            f"{', '.join(map(repr, names))}"
        )
    return {name: read_manifest(path) for name, path in zip(names, found, strict=True)}


def _manifest_path(given: str, flag: str) -> Path:
    """The manifest itself, or that of the score file or image folder `given`, or the only one in
    it."""
    path = Path(os.path.expanduser(given))
    for suffix in _SCORE_SUFFIXES:
        if path.name.endswith(suffix):
            path = path.with_name(path.name.removesuffix(suffix) + ".json")
    if path.is_dir():
        beside = Path(f"{os.path.abspath(path)}.json")
        inside = [beside] if beside.is_file() else _manifests_in(path)
        if len(inside) != 1:
            there = f"several manifests ({', '.join(map(str, inside))}); give one of them"
            raise UserError(
                f"{flag} {given}: the folder holds "
                f"{there if inside else 'no manifest of images'}, and none is called {beside.name} "
                "beside it"
            )
        path = inside[0]
    if not path.is_file():
        raise UserError(f"{flag} {given}: there is no manifest {path}")
    return path


def _manifests_in(folder: Path) -> list[Path]:
    """The manifests in a folder: JSON files with their image folder or their scores beside them."""
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if path.with_suffix("").is_dir()
        or any(path.with_name(path.stem + suffix).is_file() for suffix in _SCORE_SUFFIXES)
    ]


def _check_outdir(outdir: Path) -> None:
    check_directory(outdir, "--outdir")
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir: cannot make {outdir}: {error.strerror}") from None
    if not os.access(outdir, os.W_OK):
        raise UserError(f"--outdir: {outdir} cannot be written to")


def folder_name(label: str) -> str:
    """Make a folder's name of a label, without what does not belong into one."""
    return re.sub(r"[^\w.-]+", "_", label).strip("._") or "models"

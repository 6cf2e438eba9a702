"""Flags that choose scorers, and every check on them that needs no torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError
from sdpo.evaluation.score.scorers import PUBLISHED, scorer_names
from sdpo.models.locations import HUB_ID

if TYPE_CHECKING:
    from sdpo.evaluation.score.scoring import ScoreOptions

PRECISION_NAMES = ("auto", "no", "fp16", "bf16")


def add_scoring_flags(parser: argparse.ArgumentParser, batch_flag: str = "--batch_size") -> None:
    """The flags of score.py; evaluate.py's batch size of generation has the usual name there."""
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--scorers",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(scorer_names())} (default: {' '.join(PUBLISHED)})",
    )
    group.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="weights of a scorer from this machine instead of the hub, e.g. "
        "pickscore=DIR, hpsv2=HPS_v2_compressed.pt, aesthetics.clip=DIR",
    )
    add_device_flags(group, batch_flag)


def add_device_flags(group: argparse._ArgumentGroup, batch_flag: str = "--batch_size") -> None:
    """Where and how scorers run."""
    add = group.add_argument
    add("--device", help="e.g. cuda:1, mps, cpu (default: the best there is)")
    add(
        batch_flag,
        dest="score_batch_size",
        type=int,
        default=32,
        metavar="N",
        help="images scored at a time (default: 32)",
    )
    add(
        "--mixed_precision",
        choices=PRECISION_NAMES,
        default="auto",
        help="of the scorers (default: auto: fp16 on CUDA, else no); where it changes the first "
        "batch's scores by more than 2%% of their spread, float32 is used",
    )


def check_scoring_flags(args: argparse.Namespace) -> dict[str, str]:
    """The weights by scorer and part, "NAME" or "NAME.PART" to a path.

    Raises:
        UserError: naming the flag and what would be right.
    """
    check_scorers(args.scorers or [])
    check_batch_size(args)
    return parse_weights(args.weights, "--weights")


def check_scorers(names: list[str]) -> None:
    """Values of --scorers.

    Raises:
        UserError: one is unknown or named twice.
    """
    known = scorer_names()
    if len(set(names)) < len(names):
        raise UserError(f"--scorers: one is named twice: {' '.join(names)}")
    for name in names:
        if name not in known:
            raise UserError(f"--scorers: there is no scorer {name!r}; there are: {' '.join(known)}")


def check_batch_size(args: argparse.Namespace) -> None:
    """A scoring batch holds at least one image.

    Raises:
        UserError: otherwise.
    """
    if args.score_batch_size < 1:
        raise UserError(f"the scorers' batch size must be at least 1, got {args.score_batch_size}")


def parse_weights(given: list[str], flag: str) -> dict[str, str]:
    """["NAME=PATH", "NAME.PART=PATH"] as a dict.

    Raises:
        UserError: of another form, an unknown scorer, or a path that is not there; names `flag`.
    """
    known = scorer_names()
    weights: dict[str, str] = {}
    for value in given:
        name, equals, path = value.partition("=")
        if not equals or not path or name.partition(".")[0] not in known:
            raise UserError(
                f"{flag}: {value!r} is not NAME=PATH or NAME.PART=PATH with a scorer's name "
                f"({' '.join(known)})"
            )
        local = Path(os.path.expanduser(path))
        if not local.exists() and not HUB_ID.fullmatch(path):
            raise UserError(f"{flag} {name}: there is no file or directory {path}")
        weights[name] = str(local) if local.exists() else path
    return weights


def score_options(args: argparse.Namespace, weights: dict[str, str]) -> ScoreOptions:
    """What `sdpo.evaluation.score.scoring.score_manifests` takes."""
    from sdpo.evaluation.score.scoring import ScoreOptions

    return ScoreOptions(
        weights=weights,
        device=args.device,
        batch_size=args.score_batch_size,
        mixed_precision=args.mixed_precision,
        cache_dir=args.cache_dir,
    )

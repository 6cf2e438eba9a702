"""Scorers, one file each: a file `NAME.py` in this folder that defines `class Scorer` (a subclass
of `sdpo.evaluation.score.base.BaseScorer`) makes NAME a value of `--scorers`. Nothing else needs to
know of it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpo.evaluation.score.base import BaseScorer

SCORERS_DIR = Path(__file__).resolve().parent
PUBLISHED = ("pickscore", "hpsv2", "aesthetics", "clip", "imagereward")


def scorer_names() -> list[str]:
    """The scorers there are, sorted; read from the folder, so that `--help` needs no torch."""
    return sorted(path.stem for path in SCORERS_DIR.glob("*.py") if path.stem != "__init__")


def get_scorer(name: str) -> type[BaseScorer]:
    """The class of a scorer.

    Raises:
        ValueError: no file of that name in `eval/scorers/`.
    """
    if name not in scorer_names():
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(scorer_names())}")
    return import_module(f"{__name__}.{name}").Scorer

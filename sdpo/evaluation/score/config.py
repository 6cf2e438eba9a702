"""Flags that choose scorers and say how they run, and every check on them that needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError
from sdpo.common.flags import flag
from sdpo.evaluation.score.scorers import PUBLISHED, scorer_names
from sdpo.models.locations import HUB_ID

if TYPE_CHECKING:
    from sdpo.evaluation.score.base import BaseScorer
    from sdpo.evaluation.score.weights import Weights


@dataclass(frozen=True)
class ScorerConfig:
    """Says where and how a scorer runs."""

    device: str | None = flag(None, "e.g. cuda:1, mps, cpu", shown="the best there is")
    batch_size: int = flag(32, "images scored at a time", metavar="N")
    mixed_precision: str = flag(
        "auto",
        "of the scorers; auto: fp16 on CUDA, else no; where it changes the first batch's scores by "
        "more than 2% of their spread, float32 is used",
        choices=("auto", "no", "fp16", "bf16"),
    )


@dataclass(frozen=True)
class ScoringConfig(ScorerConfig):
    """Says which scorers run, with which weights, and how."""

    scorers: tuple[str, ...] = flag(
        (),
        f"of {', '.join(scorer_names())}",
        metavar="NAME",
        shown=" ".join(PUBLISHED),
    )
    weights: tuple[str, ...] = flag(
        (),
        "weights of a scorer from this machine instead of the hub, e.g. pickscore=DIR, "
        "hpsv2=HPS_v2_compressed.pt, aesthetics.clip=DIR",
        metavar="NAME=PATH",
        extend=True,
    )

    @property
    def names(self) -> list[str]:
        """The scorers that were chosen, else the published ones."""
        return list(self.scorers or PUBLISHED)

    def options(self, cache_dir: str | None) -> ScoreOptions:
        """Complete these flags by what --weights names and the place of downloads.

        Raises:
            UserError: --weights is not usable.
        """
        return ScoreOptions(self, parse_weights(self.weights, "--weights"), cache_dir)


@dataclass(frozen=True)
class ScoreOptions:
    """Says all of how to score.

    Attributes:
        how: device, batch size and precision.
        weights: SCORER or SCORER.PART to a path or hub id.
        cache_dir: where downloads are kept.
        workers: threads that decode images.
    """

    how: ScorerConfig = field(default_factory=ScorerConfig)
    weights: dict[str, str] = field(default_factory=dict)
    cache_dir: str | None = None
    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))

    def of(self, name: str, scorer: type[BaseScorer]) -> Weights:
        """Pick the weights of one scorer.

        Raises:
            UserError: a part that the scorer does not have.
        """
        from sdpo.evaluation.score.weights import Weights

        split = ((key.partition("."), path) for key, path in self.weights.items())
        mine = {part or "model": path for (own, _, part), path in split if own == name}
        for part in mine.keys() - scorer.parts.keys():
            known = ", ".join(k if k == "model" else f"{name}.{k}" for k in scorer.parts) or "none"
            raise UserError(f"--weights {name}.{part}: {name} has no such part; it has: {known}")
        return Weights(name, scorer.parts, mine, self.cache_dir)


def check_scoring(config: ScoringConfig) -> None:
    """Refuse flags of scoring that are not usable.

    Raises:
        UserError: a scorer is unknown or named twice; no batch; weights that are not there.
    """
    names, known = config.scorers, scorer_names()
    if len(set(names)) < len(names):
        raise UserError(f"--scorers: one is named twice: {' '.join(names)}")
    for name in names:
        if name not in known:
            raise UserError(f"--scorers: there is no scorer {name!r}; there are: {' '.join(known)}")
    check_batch_size(config)
    parse_weights(config.weights, "--weights")


def check_batch_size(config: ScorerConfig) -> None:
    """Refuse a batch without an image.

    Raises:
        UserError: it is one.
    """
    if config.batch_size < 1:
        raise UserError(f"the scorers' batch size must be at least 1, got {config.batch_size}")


def parse_weights(given: Iterable[str], flag: str) -> dict[str, str]:
    """Take ["NAME=PATH", "NAME.PART=PATH"] apart: from name or name and part to path or hub id.

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

"""Training samples: a pair's two images, its caption, and where it stands in the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.common.randomness import Key, integer, uniform
from sdpo.data.order import Place, epoch_permutation
from sdpo.data.source import LABEL, Columns, PairSource
from sdpo.data.transforms import PairTransform, UndecodableImage, open_image

MAX_REPLACEMENTS = 50

NumberedRow = tuple[int | str, dict[str, Any]]


@dataclass(frozen=True)
class BadRow:
    """A row that could not be decoded; `row` counts from 0 in the dataset as it was given, or while
    streaming several shards in its own ("3 of shard 7")."""

    row: int | str
    reason: str


@dataclass(frozen=True)
class Pair:
    """One training sample; images (3, R, R) in [-1, 1]."""

    winner: Tensor
    loser: Tensor
    caption: str
    key: Key  # (seed, epoch, position)
    bad_rows: tuple[BadRow, ...] = ()


class Placed:
    """A batch whose pairs have keys."""

    keys: list[Key]

    @property
    def place(self) -> Place:
        """Where the first pair of this process stands."""
        return Place(*self.keys[0][1:])

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class PairBatch(Placed):
    """B pairs of one process: pixels (2B, 3, R, R), winners first."""

    pixels: Tensor
    captions: list[str]
    keys: list[Key]
    bad_rows: list[BadRow] = field(default_factory=list)

    def pin_memory(self) -> PairBatch:
        """Called by `DataLoader(pin_memory=True)`."""
        return PairBatch(self.pixels.pin_memory(), self.captions, self.keys, self.bad_rows)


def collate(pairs: list[Pair]) -> PairBatch:
    """Stack pairs to a batch."""
    return PairBatch(
        pixels=torch.stack([p.winner for p in pairs] + [p.loser for p in pairs]),
        captions=[p.caption for p in pairs],
        keys=[p.key for p in pairs],
        bad_rows=[bad for p in pairs for bad in p.bad_rows],
    )


def as_caption(value: Any, column: str) -> str:
    """One caption of a column; none is the empty one.

    Raises:
        UserError: it is not text.
    """
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"--caption_column {column}: captions must be text or lists of text, found "
            f"{type(value).__name__}"
        )
    return value or ""


@dataclass(frozen=True)
class PairDecoder:
    """Turns a row of the dataset into a `Pair`, given its key."""

    columns: Columns
    base: Path | None
    transform: PairTransform
    proportion_empty_prompts: float

    def __call__(self, row: dict[str, Any], key: Key) -> Pair:
        """Decode one row.

        Raises:
            UndecodableImage: one of its images is missing or broken.
        """
        images = self.images(row)
        winner, loser = images if float(row[LABEL]) == 1.0 else images[::-1]
        pixels_w, pixels_l = self.transform(winner, loser, key)
        return Pair(pixels_w, pixels_l, self.caption(row, key), key)

    def images(self, row: dict[str, Any]) -> list[Image.Image]:
        """Image 0 and image 1 of a row, RGB.

        Raises:
            UndecodableImage: one of them is missing or broken.
        """
        return [
            open_image(row[name], self.base)
            for name in (self.columns.image_0, self.columns.image_1)
        ]

    def caption(self, row: dict[str, Any], key: Key) -> str:
        """The caption that a row trains with: of several one by the key, or none at all.

        Raises:
            UserError: the column holds something else than text.
        """
        if uniform(*key, "caption-dropout") < self.proportion_empty_prompts:
            return ""
        value = row[self.columns.caption]
        if isinstance(value, list | tuple):
            value = value[integer(len(value), *key, "caption-choice")] if value else ""
        return as_caption(value, self.columns.caption)


class PairDataset(torch.utils.data.Dataset):
    """Map-style pairs, indexed by `Place`. A row that cannot be decoded is replaced by another,
    which again is a function of (seed, epoch, position)."""

    collate = staticmethod(collate)

    def __init__(self, source: PairSource, decoder: PairDecoder, seed: int) -> None:
        self.source, self.decoder, self.seed = source, decoder, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Pair:
        key = (self.seed, *place)
        return decode_first(self.decoder, self._candidates(key), key)

    def _candidates(self, key: Key) -> Iterator[NumberedRow]:
        """The row at a place, then replacements without end."""
        seed, epoch, position = key
        index = int(epoch_permutation(len(self), seed, epoch)[position])
        for attempt in count(1):
            yield int(self.source.origin[index]), self.source.row(index)
            index = integer(len(self), *key, "replacement", attempt)


def decode_first(decoder: PairDecoder, candidates: Iterable[NumberedRow], key: Key) -> Pair:
    """The pair of the first candidate that can be decoded; it carries those that could not.

    Raises:
        UserError: more than `MAX_REPLACEMENTS` of them, or all there are, cannot.
    """
    bad: list[BadRow] = []
    for number, row in candidates:
        try:
            pair = decoder(row, key)
        except UndecodableImage as error:
            bad.append(BadRow(number, str(error)))
        else:
            return replace(pair, bad_rows=tuple(bad))
        if len(bad) > MAX_REPLACEMENTS:
            break
    raise UserError(
        f"{len(bad)} rows one after another cannot be decoded, the first of them row {bad[0].row} "
        f"({bad[0].reason}): check that the image columns hold encoded images"
    )

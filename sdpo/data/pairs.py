"""Training samples: a pair's two images, its caption, and where it stands in the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo.data.order import FIRST, Place, epoch_permutation
from sdpo.data.source import DREAMLIKE, LABEL, Columns, PairSource, bad_label
from sdpo.data.transforms import PairTransform, UndecodableImage, open_image
from sdpo.errors import UserError
from sdpo.randomness import Key, integer, uniform

MAX_REPLACEMENTS = 50
SHUFFLE_BUFFER = 1000  # pairs held in memory while streaming


@dataclass(frozen=True)
class BadRow:
    """A row that could not be decoded; `row` counts from 0 in the dataset as it was given."""

    row: int
    reason: str


@dataclass(frozen=True)
class Pair:
    """One training sample; images (3, R, R) in [-1, 1]."""

    winner: Tensor
    loser: Tensor
    caption: str
    key: Key  # (seed, epoch, position)
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class PairBatch:
    """B pairs of one process: pixels (2B, 3, R, R), winners first."""

    pixels: Tensor
    captions: list[str]
    keys: list[Key]
    bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """Where the first pair of this process stands."""
        return Place(*self.keys[0][1:])

    def __len__(self) -> int:
        return len(self.captions)

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
        images = [
            open_image(row[name], self.base)
            for name in (self.columns.image_0, self.columns.image_1)
        ]
        winner, loser = images if float(row[LABEL]) == 1.0 else images[::-1]
        pixels_w, pixels_l = self.transform(winner, loser, key)
        return Pair(pixels_w, pixels_l, self._caption(row[self.columns.caption], key), key)

    def _caption(self, value: Any, key: Key) -> str:
        if uniform(*key, "caption-dropout") < self.proportion_empty_prompts:
            return ""
        if isinstance(value, list | tuple):
            value = value[integer(len(value), *key, "caption-choice")] if value else ""
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"--caption_column {self.columns.caption}: captions must be text or lists of "
                f"text, found {type(value).__name__}"
            )
        return value or ""


class PairDataset(torch.utils.data.Dataset):
    """Map-style pairs, indexed by `Place`. A row that cannot be decoded is replaced by another,
    which again is a function of (seed, epoch, position)."""

    def __init__(self, source: PairSource, decoder: PairDecoder, seed: int) -> None:
        self.source, self.decoder, self.seed = source, decoder, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Pair:
        key = (self.seed, *place)
        index = int(epoch_permutation(len(self), self.seed, place.epoch)[place.position])
        bad: list[BadRow] = []
        while True:
            try:
                pair = self.decoder(self.source.rows[index], key)
            except UndecodableImage as error:
                bad.append(BadRow(int(self.source.origin[index]), str(error)))
            else:
                return Pair(pair.winner, pair.loser, pair.caption, key, tuple(bad))
            if len(bad) > MAX_REPLACEMENTS:
                raise UserError(_all_bad(bad))
            index = integer(len(self), *key, "replacement", len(bad))


def is_wanted(row: dict[str, Any], number: int, dreamlike_only: bool = False) -> bool:
    """Whether a row is a decided pair (and, where asked for, of dreamlike models alone).

    Raises:
        UserError: its label is none of 0, 0.5 and 1.
    """
    label = row[LABEL]
    if label is None or float(label) == 0.5:
        return False
    if float(label) not in (0.0, 1.0):
        raise UserError(bad_label(number, label))
    if dreamlike_only:
        return all(DREAMLIKE in (row[name] or "") for name in ("model_0", "model_1"))
    return True


class StreamingPairs(torch.utils.data.IterableDataset):
    """Batches (lists of `Pair`) of one process, read in order and without end from a stream.

    Every process reads the whole stream, undecoded, and decodes its own slice of each step, so that
    the pairs of a step do not depend on the number of processes.
    """

    def __init__(
        self,
        source: PairSource,
        decoder: PairDecoder,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        start: Place = FIRST,
        max_samples: int | None = None,
        dreamlike_only: bool = False,
    ) -> None:
        self.source, self.decoder, self.seed = source, decoder, seed
        self.batch_size, self.rank = batch_size, rank
        self.stride = batch_size * world_size
        self.start, self.max_samples, self.dreamlike_only = start, max_samples, dreamlike_only

    def __iter__(self) -> Iterator[list[Pair]]:
        epoch, position = self.start
        while True:
            steps = 0
            for step in self._steps(epoch, skip=position):
                yield step
                steps += 1
            if steps == 0 and position == 0:
                raise UserError(
                    f"--streaming: an epoch has fewer usable pairs than one step of all processes "
                    f"takes ({self.stride}): lower --train_batch_size"
                )
            epoch, position = epoch + 1, 0

    def _steps(self, epoch: int, skip: int) -> Iterator[list[Pair]]:
        rows = self._decided_rows(epoch)
        for _ in range(skip):
            if next(rows, None) is None:
                return
        ahead: deque[tuple[int, dict[str, Any]]] = deque()
        position = skip
        while True:
            while len(ahead) < self.stride:
                row = next(rows, None)
                if row is None:
                    return
                ahead.append(row)
            mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            yield [self._decode(ahead, rows, i, (self.seed, epoch, position + i)) for i in mine]
            for _ in range(self.stride):
                ahead.popleft()
            position += self.stride

    def _decode(self, ahead: deque, rows: Iterator, index: int, key: Key) -> Pair:
        """Decode `ahead[index]`; where that fails, the next row that decodes."""
        bad: list[BadRow] = []
        for number, row in self._rows_from(ahead, rows, index):
            try:
                pair = self.decoder(row, key)
            except UndecodableImage as error:
                bad.append(BadRow(number, str(error)))
            else:
                return Pair(pair.winner, pair.loser, pair.caption, key, tuple(bad))
            if len(bad) > MAX_REPLACEMENTS:
                break
        raise UserError(_all_bad(bad))

    @staticmethod
    def _rows_from(
        ahead: deque, rows: Iterator, index: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows from `ahead[index]` on, reading on where `ahead` ends; after the epoch's last
        row those of `ahead` before `index`."""
        for i in count(index):
            if i == len(ahead):
                following = next(rows, None)
                if following is None:
                    break
                ahead.append(following)
            yield ahead[i]
        yield from list(ahead)[:index]

    def _decided_rows(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        numbered = self.source.rows.map(
            lambda row, number: {**row, _NUMBER: number}, with_indices=True
        )
        shuffled = numbered.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        # --max_train_samples cuts the order off, which must then be the same in every epoch.
        shuffled.set_epoch(epoch if self.max_samples is None else 0)
        taken = 0
        for row in shuffled:
            number = row.pop(_NUMBER)
            if not is_wanted(row, number, self.dreamlike_only):
                continue
            if self.max_samples is not None and taken >= self.max_samples:
                return
            taken += 1
            yield number, row


_NUMBER = "__row__"


def _all_bad(bad: list[BadRow]) -> str:
    return (
        f"{len(bad)} rows one after another cannot be decoded, the first of them row {bad[0].row} "
        f"({bad[0].reason}): check that the image columns hold encoded images"
    )

"""Make training samples of rows: a pair's two images, its caption, its place in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from sdpo.common.errors import UserError
from sdpo.common.images import MissingImage, UndecodableImage, open_image
from sdpo.common.randomness import Key, integer, uniform
from sdpo.data.order import PairOrder, Place
from sdpo.data.source import LABEL, SHAPE, Columns, PairSource, winner_of
from sdpo.data.transforms import PairTransform, Shape

MAX_REPLACEMENTS = 50
_OF_ITS_BUCKET = 25  # replacements; after these others will do

Row = dict[str, Any]
NumberedRow = tuple[int | str, Row]


@dataclass(frozen=True)
class BadRow:
    """Name a row that could not be decoded; `row` counts from 0 in the dataset as it was given, or
    while streaming several shards in its own ("3 of shard 7")."""

    row: int | str
    reason: str


@dataclass(frozen=True)
class Pair:
    """Hold one training sample: images (3, H, W) in [-1, 1] and a text, or from a cache their
    encodings: of each image the posterior's mean and standard deviation (2, C, h, w), of the text
    what `Family.encode_text` gave, without the batch's dimension."""

    winner: Tensor
    loser: Tensor
    caption: str | dict[str, Tensor]
    key: Key  # (seed, epoch, position)
    preference: float = 1.0  # the winner's share of it, above 0.5
    # (2, 6) int64 as `Family.conditions` has them, winner's and loser's; None of the square crop
    sizes: Tensor | None = None
    bad_rows: tuple[BadRow, ...] = ()  # which this one replaces


class Batch:
    """Hold B pairs of one process, as a dataclass of images or of their encodings. `preference`
    (B,), float32, are the winners' shares of it, above 0.5: 1 where the set gives no votes. `sizes`
    (2B, 6) are as `Family.conditions` has them, winners first; None of the square crop."""

    keys: list[Key]
    bad_rows: list[BadRow]
    preference: Tensor | None
    sizes: Tensor | None

    @property
    def place(self) -> Place:
        """Tell where the first pair of this process stands."""
        return Place(*self.keys[0][1:])

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class PairBatch(Batch):
    """Hold images: pixels (2B, 3, H, W), winners first, and B captions."""

    pixels: Tensor
    captions: list[str]
    keys: list[Key]
    bad_rows: list[BadRow] = field(default_factory=list)
    preference: Tensor | None = None
    sizes: Tensor | None = None

    def pin_memory(self) -> PairBatch:
        """Copy to page-locked memory, for `DataLoader(pin_memory=True)`."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class EncodedBatch(Batch):
    """Hold encodings: moments (2B, 2, C, h, w), winners first, and text by name, (B, ...)."""

    moments: Tensor
    text: dict[str, Tensor]
    keys: list[Key]
    bad_rows: list[BadRow] = field(default_factory=list)
    preference: Tensor | None = None
    sizes: Tensor | None = None

    def pin_memory(self) -> EncodedBatch:
        """Copy to page-locked memory, for `DataLoader(pin_memory=True)`."""
        text = {name: tensor.pin_memory() for name, tensor in self.text.items()}
        return replace(self, moments=self.moments.pin_memory(), text=text)


def collate(pairs: list[Pair]) -> PairBatch | EncodedBatch:
    """Stack pairs, which all hold images or all hold encodings, to a batch."""
    kind = PairBatch if isinstance(pairs[0].caption, str) else EncodedBatch
    sizes = [p.sizes for p in pairs if p.sizes is not None]
    return kind(
        torch.stack([p.winner for p in pairs] + [p.loser for p in pairs]),
        # A list of texts, or of the encodings' dicts one dict of stacked tensors.
        default_collate([p.caption for p in pairs]),
        [p.key for p in pairs],
        [bad for p in pairs for bad in p.bad_rows],
        torch.tensor([p.preference for p in pairs]),
        torch.stack(sizes).transpose(0, 1).flatten(0, 1) if sizes else None,
    )


def as_caption(value: Any, column: str) -> str:
    """Take one caption of a column; none is the empty one, a whole number its digits.

    Raises:
        UserError: it is not text.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"--caption_column {column}: captions must be text or lists of text, found "
            f"{type(value).__name__}"
        )
    return value or ""


@dataclass(frozen=True)
class PairDecoder:
    """Decode a row of the dataset to the `Pair` of a key."""

    columns: Columns
    base: Path | None
    transform: PairTransform
    proportion_empty_prompts: float

    def __call__(self, row: Row, key: Key) -> Pair:
        """Decode one row.

        Raises:
            UndecodableImage: one of its images is missing or broken.
        """
        images = self.images(row)
        winner, share = winner_of(float(row[LABEL]))
        both, shape = (images[winner], images[1 - winner]), row.get(SHAPE)
        pixels = self.transform(*both, key, shape)
        sizes = self.sizes([image.size for image in both], key, shape)
        return Pair(*pixels, self.caption(row, key), key, share, sizes=sizes)

    def sizes(self, originals: list[Shape], key: Key, shape: Shape | None) -> Tensor | None:
        """Give the sizes (2, 6) of winner and loser; see `Pair`."""
        if shape is None:
            return None
        return torch.tensor([self.transform.told(size, key, shape) for size in originals])

    def images(self, row: Row) -> list[Image.Image]:
        """Open image 0 and image 1 of a row, RGB.

        Raises:
            UndecodableImage: one of them is missing or broken.
        """
        names = (self.columns.image_0, self.columns.image_1)
        return [open_image(row[name], self.base) for name in names]

    def caption(self, row: Row, key: Key) -> str:
        """Choose the caption that a row trains with: of several one by the key, or none at all.

        Raises:
            UserError: the column holds something else than text.
        """
        if uniform(*key, "caption-dropout") < self.proportion_empty_prompts:
            return ""
        value = row[self.columns.caption]
        if isinstance(value, list | tuple):
            value = value[integer(len(value), *key, "caption-choice")] if value else ""
        return as_caption(value, self.columns.caption)


Decoder = Callable[[Row, Key], Pair]  # of images, or of what a cache holds of them


class PairDataset(Dataset[Pair]):
    """Give the pair at a `Place`. A row that cannot be decoded is replaced by another, where there
    are buckets of its own, which again is a function of (seed, epoch, position)."""

    any_shape = True  # rows of other buckets can be cropped to a shape where it comes to that

    def __init__(self, source: PairSource, decoder: Decoder, order: PairOrder) -> None:
        self.source, self.decoder, self.order = source, decoder, order

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Pair:
        key = (self.order.seed, *place)
        return decode_first(self.decoder, self._candidates(key), key)

    def _candidates(self, key: Key) -> Iterator[NumberedRow]:
        """Give the row at a place, then replacements without end."""
        index = self.order.row(Place(*key[1:]))
        alike, row = self.order.alike(index), self.source.row(index)
        shape = {SHAPE: row[SHAPE]} if SHAPE in row else {}
        for attempt in count(1):
            yield int(self.source.origin[index]), row
            if self.any_shape and attempt > _OF_ITS_BUCKET:
                alike = range(len(self))
            index = int(alike[integer(len(alike), *key, "replacement", attempt)])
            row = {**self.source.row(index), **shape}


def decode_first(decoder: Decoder, candidates: Iterable[NumberedRow], key: Key) -> Pair:
    """Decode the first candidate that can be; its pair names those that could not.

    Raises:
        UserError: more than `MAX_REPLACEMENTS` of them, or all there are, cannot.
    """
    bad: list[BadRow] = []
    advice = "check that the image columns hold encoded images"
    for number, row in candidates:
        try:
            pair = decoder(row, key)
        except UndecodableImage as error:
            if not bad and isinstance(error, MissingImage):
                advice = "paths of images are relative to the table they stand in; --image_root DIR"
                advice += " names another place"
            bad.append(BadRow(number, str(error)))
        else:
            return replace(pair, bad_rows=tuple(bad))
        if len(bad) > MAX_REPLACEMENTS:
            break
    # A small set's rows come more than once.
    rows = len({each.row for each in bad})
    which = f"row {bad[0].row} cannot be decoded"
    if rows > 1:
        which = f"{rows} rows cannot be decoded, the first of them row {bad[0].row}"
    raise UserError(f"{which} ({bad[0].reason}): {advice}")

"""Training samples from a cache: the same rows, captions and flips as from the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdpo.common.randomness import Key
from sdpo.data.pairs import BadRow, NumberedRow, PairDataset, PairDecoder, Placed
from sdpo.data.source import LABEL, PairSource
from sdpo.data.transforms import UndecodableImage

if TYPE_CHECKING:
    from sdpo.data.latents.store import LatentCache

ROW = "row of the dataset"


@dataclass(frozen=True)
class EncodedPair:
    """One training sample: per image the posterior's mean and standard deviation (2, C, r, r), of
    the caption what `Family.encode_text` gave, without the batch's dimension."""

    winner: Tensor
    loser: Tensor
    text: dict[str, Tensor]
    key: Key
    bad_rows: tuple[BadRow, ...] = ()


@dataclass(frozen=True)
class EncodedBatch(Placed):
    """B pairs of one process: moments (2B, 2, C, r, r), winners first; text by name, (B, ...)."""

    moments: Tensor
    text: dict[str, Tensor]
    keys: list[Key]
    bad_rows: list[BadRow] = field(default_factory=list)

    def pin_memory(self) -> EncodedBatch:
        """Called by `DataLoader(pin_memory=True)`."""
        text = {name: tensor.pin_memory() for name, tensor in self.text.items()}
        return replace(self, moments=self.moments.pin_memory(), text=text)


def collate_encoded(pairs: list[EncodedPair]) -> EncodedBatch:
    """Stack pairs to a batch."""
    return EncodedBatch(
        moments=torch.stack([p.winner for p in pairs] + [p.loser for p in pairs]),
        text={name: torch.stack([p.text[name] for p in pairs]) for name in pairs[0].text},
        keys=[p.key for p in pairs],
        bad_rows=[bad for p in pairs for bad in p.bad_rows],
    )


@dataclass(frozen=True)
class CachedDecoder:
    """Turns a row's label, caption and number into an `EncodedPair`; choices that depend on the key
    are those of the decoder of images."""

    cache: LatentCache
    images: PairDecoder

    def __call__(self, row: dict[str, Any], key: Key) -> EncodedPair:
        """Read one row.

        Raises:
            UndecodableImage: when the cache was built, one of its images was missing or broken.
        """
        number = row[ROW]
        if number in self.cache.bad:
            raise UndecodableImage(self.cache.bad[number])
        both = self.cache.moments(number, self.images.transform.flips(key))
        winner, loser = both if float(row[LABEL]) == 1.0 else both.flip(0)
        return EncodedPair(winner, loser, self.cache.text(self.images.caption(row, key)), key)


class CachedPairs(PairDataset):
    """`PairDataset` from a cache: the same rows at the same places, the same replacements."""

    collate = staticmethod(collate_encoded)

    def __init__(
        self, cache: LatentCache, source: PairSource, decoder: PairDecoder, seed: int
    ) -> None:
        kept = list(dict.fromkeys([LABEL, source.columns.caption]))
        without_images = replace(source, rows=source.rows.select_columns(kept))
        super().__init__(without_images, CachedDecoder(cache, decoder), seed)

    def _candidates(self, key: Key) -> Iterator[NumberedRow]:
        for number, row in super()._candidates(key):
            yield number, {**row, ROW: number}

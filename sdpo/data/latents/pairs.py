"""Make training samples from a cache: the same rows, captions and flips as from the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdpo.common.images import UndecodableImage
from sdpo.common.randomness import Key
from sdpo.data.pairs import NumberedRow, Pair, PairDataset, PairDecoder, Row
from sdpo.data.source import LABEL, PairSource, winner_of

if TYPE_CHECKING:
    from sdpo.data.latents.store import LatentCache

ROW = "row of the dataset"


@dataclass(frozen=True)
class CachedDecoder:
    """Read the encodings of a row from its label, caption and number; choices that depend on the
    key are those of the decoder of images."""

    cache: LatentCache
    images: PairDecoder

    def __call__(self, row: Row, key: Key) -> Pair:
        """Read one row.

        Raises:
            UndecodableImage: when the cache was built, one of its images was missing or broken.
        """
        number = row[ROW]
        if number in self.cache.bad:
            raise UndecodableImage(self.cache.bad[number])
        both = self.cache.moments(number, self.images.transform.flips(key))
        winner, share = winner_of(float(row[LABEL]))
        text = self.cache.text(self.images.caption(row, key))
        return Pair(both[winner], both[1 - winner], text, key, share)


class CachedPairs(PairDataset):
    """Give pairs from a cache: the same rows at the same places, the same replacements."""

    def __init__(
        self, cache: LatentCache, source: PairSource, decoder: PairDecoder, seed: int
    ) -> None:
        kept = list(dict.fromkeys([LABEL, source.columns.caption]))
        without_images = replace(source, rows=source.rows.select_columns(kept))
        super().__init__(without_images, CachedDecoder(cache, decoder), seed)

    def _candidates(self, key: Key) -> Iterator[NumberedRow]:
        for number, row in super()._candidates(key):
            yield number, {**row, ROW: number}

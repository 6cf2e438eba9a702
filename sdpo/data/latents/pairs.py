"""Make training samples from a cache: the same rows, captions and flips as from the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdpo.common.images import UndecodableImage
from sdpo.common.randomness import Key
from sdpo.data.order import PairOrder
from sdpo.data.pairs import NumberedRow, Pair, PairDataset, PairDecoder, Row
from sdpo.data.source import LABEL, SHAPE, SIZES, PairSource, winner_of

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
        originals = [row[SIZES][side] for side in (winner, 1 - winner)] if SHAPE in row else []
        if not all(map(all, originals)):
            raise UndecodableImage("its header could not be read")
        sizes = self.images.sizes(originals, key, row.get(SHAPE))
        return Pair(both[winner], both[1 - winner], text, key, share, sizes=sizes)


class CachedPairs(PairDataset):
    """Give pairs from a cache: the same rows at the same places, the same replacements."""

    any_shape = False

    def __init__(
        self, cache: LatentCache, source: PairSource, decoder: PairDecoder, order: PairOrder
    ) -> None:
        kept = list(dict.fromkeys([LABEL, source.columns.caption]))
        without_images = replace(source, rows=source.rows.select_columns(kept))
        super().__init__(without_images, CachedDecoder(cache, decoder), order)

    def _candidates(self, key: Key) -> Iterator[NumberedRow]:
        for number, row in super()._candidates(key):
            yield number, {**row, ROW: number}

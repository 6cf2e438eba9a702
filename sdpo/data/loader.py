"""Load batches of pairs without end, resumable, with bad images counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from sdpo.common.errors import UserError
from sdpo.config import TrainConfig
from sdpo.data.buckets import in_buckets
from sdpo.data.latents.pairs import CachedPairs
from sdpo.data.order import FIRST, BucketOrder, PairOrder, Place, PlaceSampler
from sdpo.data.pairs import BadRow, Batch, PairDataset, PairDecoder, collate
from sdpo.data.source import PairSource
from sdpo.data.stream import OwnShards, StreamingPairs
from sdpo.data.transforms import PairTransform
from sdpo.data.workers import batches_of

if TYPE_CHECKING:
    from sdpo.data.latents.store import LatentCache

log = logging.getLogger(__name__)

# Below this many pairs seen, a share of bad ones says little; the limit counts as if of so many.
MIN_SEEN = 200


class BadRowCounter:
    """Name each undecodable row once in the log and stop once too large a share is bad."""

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.rows: set[int | str] = set()
        self.seen = 0

    def update(self, batch_size: int, bad_rows: list[BadRow]) -> None:
        """Count one batch.

        Raises:
            UserError: more than `max_fraction` of the pairs seen (at least of 200) are bad.
        """
        self.seen += batch_size
        for bad in bad_rows:
            if bad.row not in self.rows:
                log.warning("row %s skipped, its image cannot be decoded: %s", bad.row, bad.reason)
                self.rows.add(bad.row)
        allowed = self.max_fraction * max(self.seen, MIN_SEEN)
        if len(self.rows) > allowed:
            named = ", ".join(str(row) for row in sorted(self.rows)[:5])
            raise UserError(
                f"{len(self.rows)} of {self.seen} pairs cannot be decoded (rows {named}, ...), "
                f"more than --max_bad_fraction {self.max_fraction} allows: mend them or raise it"
            )


class PairLoader:
    """Give the batches of one process without end, from `start` on.

    `place_after(batch)` is what a checkpoint stores to go on from there.

    Raises:
        UserError: there are too few pairs, or files, for one step of all processes.
    """

    def __init__(
        self,
        source: PairSource,
        config: TrainConfig,
        rank: int,
        world_size: int,
        start: Place = FIRST,
        pin_memory: bool = False,
        cache: LatentCache | None = None,
    ) -> None:
        data, seed = config.data, config.run.seed
        assert data.resolution
        source = in_buckets(source, data)
        self.source, self.cache, self.rank, self._optim = source, cache, rank, config.optim
        self.batch_size = config.optim.train_batch_size
        self.stride = self.batch_size * world_size
        self.order: PairOrder | None = None  # None of a stream
        self.counter = BadRowCounter(data.max_bad_fraction)
        transform = PairTransform(data.resolution, data.random_crop, not data.no_hflip)
        decoder = PairDecoder(source.columns, source.base, transform, data.proportion_empty_prompts)
        dataset: Dataset[Any]
        if data.streaming:
            stream = OwnShards if data.stream_shards == "own" else StreamingPairs
            dataset = stream(source, decoder, config, rank, world_size, start)
            batches: dict[str, Any] = {"batch_size": None}
        else:
            self.order = order_of(source, seed, self.stride)
            if cache is None:
                dataset = PairDataset(source, decoder, self.order)
            else:
                dataset = CachedPairs(cache, source, decoder, self.order)
            batches = {"batch_sampler": PlaceSampler(self.order, self.batch_size, rank, start)}
        self._loader = DataLoader(
            dataset,
            num_workers=data.dataloader_num_workers,
            persistent_workers=data.dataloader_num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=collate,
            **batches,
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches_of(self._loader):
            self.counter.update(len(batch), batch.bad_rows)
            yield batch

    @property
    def max_train_steps(self) -> int:
        """Count the run's optimizer steps: as many as it names, or as its passes over the data
        make.

        Raises:
            UserError: they make none, since no bucket has pairs for a step.
        """
        optim, epochs = self._optim, self._optim.num_train_epochs
        if optim.max_train_steps:
            return optim.max_train_steps
        assert epochs and self.order
        steps = self.order.steps_before(epochs)
        if not steps:
            raise UserError(
                f"--resize bucket: no bucket has as many pairs in {epochs} epochs as one step of "
                f"all processes takes ({self.stride}): lower --train_batch_size"
            )
        return math.ceil(steps / optim.gradient_accumulation_steps)

    def place_after(self, batch: Batch) -> Place:
        """Tell where the run stands once every process has taken its part of this step."""
        epoch, position = batch.place
        return Place(epoch, position - self.rank * self.batch_size + self.stride)


def order_of(source: PairSource, seed: int, stride: int) -> PairOrder:
    """Order pairs for steps of `stride`, in buckets where they have shapes.

    Raises:
        UserError: there are fewer pairs than one step takes.
    """
    if source.shapes is None:
        return PairOrder(len(source), seed, stride)
    widths, heights = source.shapes.shapes.T
    return BucketOrder(len(source), seed, stride, widths * (heights.max() + 1) + heights)

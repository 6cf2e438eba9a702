"""Load batches of pairs without end, resumable, with bad images counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from sdpo.common.errors import UserError
from sdpo.config import TrainConfig
from sdpo.data.latents.pairs import CachedPairs
from sdpo.data.order import FIRST, Place, PlaceSampler
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
        self.source, self.cache, self.rank, self._optim = source, cache, rank, config.optim
        self.batch_size = config.optim.train_batch_size
        self.stride = self.batch_size * world_size
        self.steps_per_epoch: int | None = None
        self.counter = BadRowCounter(data.max_bad_fraction)
        transform = PairTransform(data.resolution, data.random_crop, not data.no_hflip)
        decoder = PairDecoder(source.columns, source.base, transform, data.proportion_empty_prompts)
        dataset: Dataset[Any]
        if data.streaming:
            stream = OwnShards if data.stream_shards == "own" else StreamingPairs
            dataset = stream(source, decoder, config, rank, world_size, start)
            batches: dict[str, Any] = {"batch_size": None}
        else:
            sampler = PlaceSampler(len(source), self.batch_size, rank, world_size, start)
            self.steps_per_epoch = sampler.steps_per_epoch
            if cache is None:
                dataset = PairDataset(source, decoder, seed)
            else:
                dataset = CachedPairs(cache, source, decoder, seed)
            batches = {"batch_sampler": sampler}
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
        make."""
        optim = self._optim
        if optim.max_train_steps:
            return optim.max_train_steps
        epochs, steps = optim.num_train_epochs, self.steps_per_epoch
        assert epochs and steps
        return steps_for_epochs(epochs, steps, optim.gradient_accumulation_steps)

    def place_after(self, batch: Batch) -> Place:
        """Tell where the run stands once every process has taken its part of this step."""
        epoch, position = batch.place
        return Place(epoch, position - self.rank * self.batch_size + self.stride)


def steps_for_epochs(epochs: int, steps_per_epoch: int, accumulation: int) -> int:
    """Count the optimizer steps that `epochs` passes over the data make."""
    return math.ceil(epochs * steps_per_epoch / accumulation)

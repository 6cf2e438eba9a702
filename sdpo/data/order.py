"""Order pairs: which of them stands at which position of which epoch, and which positions a process
takes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from sdpo.common.errors import UserError
from sdpo.common.randomness import generator


class Place(NamedTuple):
    """Name the next pair that a run takes from its data."""

    epoch: int
    position: int


FIRST = Place(0, 0)


@lru_cache(maxsize=2)
def epoch_permutation(size: int, seed: int, epoch: int) -> torch.Tensor:
    """Draw the rows of an epoch in the order of their positions, (size,) int64."""
    return torch.randperm(size, generator=generator(seed, epoch, "order"))


class PlaceSampler:
    """Sample the batches of one process: lists of places, from `start` on, without end.

    The processes together take `batch_size * world_size` consecutive positions at a time; process
    `rank` takes its slice of them. What does not fill such a step is left out at an epoch's end.

    Raises:
        UserError: there are fewer pairs (`size`) than one step takes.
    """

    def __init__(
        self, size: int, batch_size: int, rank: int, world_size: int, start: Place = FIRST
    ) -> None:
        self.size, self.batch_size, self.rank, self.start = size, batch_size, rank, start
        self.stride = batch_size * world_size
        if size < self.stride:
            raise UserError(
                f"the data has {size} usable pairs, fewer than one step of all processes takes "
                f"({self.stride}): lower --train_batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Count the micro-steps of an epoch."""
        return self.size // self.stride

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, position = self.start
        while True:
            if position + self.stride > self.size:
                epoch, position = epoch + 1, 0
            first = position + self.rank * self.batch_size
            yield [Place(epoch, first + i) for i in range(self.batch_size)]
            position += self.stride

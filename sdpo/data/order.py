"""Order pairs: which of them stands at which position of which epoch, and which positions a process
takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
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


@dataclass(eq=False)
class PairOrder:
    """Order `size` pairs for steps that take `stride` of them, in all processes together: an epoch
    is a permutation, of which what does not fill a step at its end is left out.

    Raises:
        UserError: there are fewer pairs than one step takes.
    """

    size: int
    seed: int
    stride: int

    def __post_init__(self) -> None:
        if self.size < self.stride:
            raise UserError(
                f"the data has {self.size} usable pairs, fewer than one step of all processes "
                f"takes ({self.stride}): lower --train_batch_size"
            )

    def steps_before(self, epoch: int) -> int:
        """Count the micro-steps of all epochs before one."""
        return epoch * (self.size // self.stride)

    def positions(self, epoch: int) -> int:
        """Count the positions that an epoch's steps take."""
        return (self.steps_before(epoch + 1) - self.steps_before(epoch)) * self.stride

    def start(self, place: Place) -> Place:
        """Tell where a run begins a step that goes on at a place."""
        return place

    def steps(self, place: Place) -> Iterator[Place]:
        """Tell where each step from a place on begins, without end."""
        epoch, position = self.start(place)
        while True:
            while position + self.stride > self.positions(epoch):
                epoch, position = epoch + 1, 0
            yield Place(epoch, position)
            position += self.stride

    def row(self, place: Place) -> int:
        """Tell which pair stands at a place."""
        return int(epoch_permutation(self.size, self.seed, place.epoch)[place.position])

    def alike(self, row: int) -> np.ndarray | range:
        """List the pairs that can stand in for one."""
        return range(self.size)


@dataclass(eq=False)
class BucketOrder(PairOrder):
    """Order pairs so that each step takes pairs of one bucket.

    Each bucket goes through permutations of its own, one an epoch. An epoch has the steps that its
    pairs fill, those of all buckets shuffled; what does not fill a step is carried over and leads
    its bucket in the next epoch, so that no pair is lost and all are seen equally often.
    """

    buckets: np.ndarray  # of each pair, (size,) int64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.members = {b: np.flatnonzero(self.buckets == b) for b in np.unique(self.buckets)}

    def steps_before(self, epoch: int) -> int:
        """Count the micro-steps of all epochs before one."""
        return sum(epoch * len(rows) // self.stride for rows in self.members.values())

    def start(self, place: Place) -> Place:
        """Tell where a run begins a step that goes on at a place: at the next step's beginning,
        where it went in steps of another size before."""
        return Place(place.epoch, -(-place.position // self.stride) * self.stride)

    def row(self, place: Place) -> int:
        """Tell which pair stands at a place."""
        return int(_bucketed(self, place.epoch)[place.position])

    def alike(self, row: int) -> np.ndarray:
        """List the pairs of the same bucket."""
        return self.members[self.buckets[row]]


@lru_cache(maxsize=2)
def _bucketed(order: BucketOrder, epoch: int) -> np.ndarray:
    """Draw the rows of an epoch in the order of their positions, (positions,) int64."""
    steps = []
    for bucket, rows in order.members.items():
        count = len(rows)
        # Of the bucket's permutations, put one after another, what this epoch's steps take.
        first, end = (e * count // order.stride * order.stride for e in (epoch, epoch + 1))
        turns = range(first // count, -(-end // count))
        if first < end:
            drawn = [
                torch.randperm(count, generator=generator(order.seed, turn, "order", int(bucket)))
                for turn in turns
            ]
            taken = torch.cat(drawn).numpy()[first - turns.start * count :][: end - first]
            steps.append(rows[taken].reshape(-1, order.stride))
    if not steps:
        return np.empty(0, np.int64)
    together = np.concatenate(steps)
    shuffled = torch.randperm(len(together), generator=generator(order.seed, epoch, "steps"))
    return together[shuffled.numpy()].reshape(-1)


class PlaceSampler:
    """Sample the batches of one process: lists of places, from `start` on, without end.

    The processes together take `order.stride` consecutive positions at a time; process `rank` takes
    its slice of them.
    """

    def __init__(self, order: PairOrder, batch_size: int, rank: int, start: Place = FIRST) -> None:
        self.order, self.batch_size, self.rank, self.start = order, batch_size, rank, start

    def __iter__(self) -> Iterator[list[Place]]:
        for epoch, position in self.order.steps(self.start):
            first = position + self.rank * self.batch_size
            yield [Place(epoch, first + i) for i in range(self.batch_size)]

"""--streaming: pairs in the order of a stream, shuffled within a window, none downloaded ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch

from sdpo.common.errors import UserError
from sdpo.common.randomness import Key, generator
from sdpo.data.order import FIRST, Place
from sdpo.data.pairs import NumberedRow, Pair, PairDecoder, decode_first
from sdpo.data.source import DREAMLIKE, LABEL, PairSource, bad_label

SHUFFLE_BUFFER = 1000  # pairs held in memory, undecoded


def shuffled_pairs(
    rows: Any,
    seed: int,
    epoch: int,
    dreamlike_only: bool = False,
    shards: Sequence[int] | None = None,
) -> Iterator[NumberedRow]:
    """One epoch of the decided pairs of a `datasets.IterableDataset` with their rows' numbers,
    shards (all, or those given) and rows shuffled.

    Its own `shuffle` draws another order in a data worker than outside one, and with shards in
    another order it cannot tell a row's number. Here the order is a function of (seed, epoch).
    """
    drawn = generator(seed, epoch, "stream-order")
    held: list[NumberedRow] = []
    shards = range(rows.num_shards) if shards is None else shards
    order = [shards[i] for i in torch.randperm(len(shards), generator=drawn).tolist()]
    for item in _numbered_rows(rows, order):
        if not is_wanted(item[1], item[0], dreamlike_only):
            continue
        if len(held) < SHUFFLE_BUFFER:
            held.append(item)
            continue
        i = int(torch.randint(SHUFFLE_BUFFER, (), generator=drawn))
        yield held[i]
        held[i] = item
    for i in torch.randperm(len(held), generator=drawn).tolist():
        yield held[i]


def _numbered_rows(rows: Any, shards: list[int]) -> Iterator[NumberedRow]:
    for shard in shards:
        for number, row in enumerate(rows.shard(rows.num_shards, shard)):
            yield (number if rows.num_shards == 1 else f"{number} of shard {shard}"), row


def is_wanted(row: dict[str, Any], number: int | str, dreamlike_only: bool = False) -> bool:
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
        rows = self._pairs_of(epoch)
        for _ in range(skip):
            if next(rows, None) is None:
                return
        ahead: deque[NumberedRow] = deque()
        position = skip
        while True:
            while len(ahead) < self.stride:
                row = next(rows, None)
                if row is None:
                    return
                ahead.append(row)
            mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            yield [self._decode(ahead, rows, i, self._key(epoch, position + i)) for i in mine]
            for _ in range(self.stride):
                ahead.popleft()
            position += self.stride

    def _key(self, epoch: int, position: int) -> Key:
        """Of the pair at a position of this stream."""
        return self.seed, epoch, position

    def _decode(self, ahead: deque, rows: Iterator, index: int, key: Key) -> Pair:
        """Decode `ahead[index]`; where that fails, the next row that decodes."""
        return decode_first(self.decoder, self._rows_from(ahead, rows, index, key[1]), key)

    def _rows_from(
        self, ahead: deque, rows: Iterator, index: int, epoch: int
    ) -> Iterator[NumberedRow]:
        """The rows from `ahead[index]` on, reading on where `ahead` ends; after the epoch's last
        row again from its first."""
        for i in count(index):
            if i == len(ahead):
                following = next(rows, None)
                if following is None:
                    break
                ahead.append(following)
            yield ahead[i]
        yield from self._pairs_of(epoch)

    def _pairs_of(self, epoch: int) -> Iterator[NumberedRow]:
        # --max_train_samples cuts the order off, which must then be the same in every epoch.
        order = epoch if self.max_samples is None else 0
        pairs = shuffled_pairs(self.source.rows, self.seed, order, self.dreamlike_only)
        return islice(pairs, self.max_samples)

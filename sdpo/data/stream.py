"""Stream pairs (--streaming): read in the order of their files, shuffled within a window, none
downloaded ahead."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any

from torch import Tensor, arange, randint, randperm
from torch.utils.data import IterableDataset

from sdpo.common.errors import UserError, first_line
from sdpo.common.randomness import Key, generator
from sdpo.config import TrainConfig
from sdpo.data.order import FIRST, Place
from sdpo.data.pairs import NumberedRow, Pair, PairDecoder, decode_first
from sdpo.data.source import DREAMLIKE, LABEL, MODELS, PairSource, bad_label, read_label
from sdpo.data.stream_rows import ShardCounts

SHUFFLE_BUFFER = 1000  # pairs held in memory, undecoded


@dataclass(eq=False)
class StreamingPairs(IterableDataset[list[Pair]]):
    """Read the batches of one process in order and without end from a stream.

    Every process reads the whole stream, undecoded, and decodes its own slice of each step, so that
    the pairs of a step do not depend on the number of processes.
    """

    source: PairSource
    decoder: PairDecoder
    config: TrainConfig
    rank: int
    world_size: int
    start: Place = FIRST

    def __post_init__(self) -> None:
        self.seed, self.batch_size = self.config.run.seed, self.config.optim.train_batch_size
        self.stride = self.batch_size * self.world_size
        self.shards = range(self.source.rows.num_shards)
        self.rank_of_run = self.rank

    @cached_property
    def counts(self) -> ShardCounts:
        """What is known of the lengths of the shards, of which this process keeps its own file."""
        return ShardCounts(self.source, self.config, self.rank_of_run)

    def __iter__(self) -> Iterator[list[Pair]]:
        epoch, position = self.start
        while True:
            steps = 0
            for step in self._steps(epoch, position):
                yield step
                steps += 1
            if steps == 0 and position == 0:
                raise UserError(
                    f"--streaming: an epoch has fewer usable pairs than one step of all processes "
                    f"takes ({self.stride}): lower --train_batch_size"
                )
            epoch, position = epoch + 1, 0

    def _steps(self, epoch: int, position: int) -> Iterator[list[Pair]]:
        rows = self._pairs_of(epoch, position)
        ahead: list[NumberedRow] = []
        while True:
            ahead += islice(rows, max(0, self.stride - len(ahead)))
            if len(ahead) < self.stride:
                return
            batch = []
            for i in range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size):
                candidates = self._candidates(ahead, rows, i, epoch)
                batch.append(decode_first(self.decoder, candidates, self._key(epoch, position + i)))
            yield batch
            del ahead[: self.stride]
            position += self.stride

    def _candidates(
        self, ahead: list[NumberedRow], rows: Iterator[NumberedRow], index: int, epoch: int
    ) -> Iterator[NumberedRow]:
        """Give `ahead[index]` and what may replace it: the epoch's rows after it, which `ahead`
        keeps where they are read for this, then those from its first on."""
        yield from ahead[index:]
        for row in rows:
            ahead.append(row)
            yield row
        yield from self._pairs_of(epoch)

    def _key(self, epoch: int, position: int) -> Key:
        """Name the pair at a position of this stream."""
        return self.seed, epoch, position

    def _pairs_of(self, epoch: int, position: int = 0) -> Iterator[NumberedRow]:
        # --max_train_samples cuts the order off, which must then be the same in every epoch.
        limit = self.config.data.max_train_samples
        pairs = self._shuffled(epoch if limit is None else 0, position)
        return islice(pairs, None if limit is None else max(0, limit - position))

    def _shuffled(self, epoch: int, position: int) -> Iterator[NumberedRow]:
        """Read the decided pairs of the stream's shards once, shards and rows shuffled, from a
        position on.

        `IterableDataset.shuffle` draws another order in a data worker than outside one, and with
        shards in another order it cannot tell a row's number. Here the order is a function of
        (seed, epoch), and so is which pairs are held at a position.
        """
        total = self.counts.total(self.shards)
        if total is not None and position >= total:
            return
        drawn = generator(self.seed, epoch, "stream-order")
        order = [self.shards[i] for i in randperm(len(self.shards), generator=drawn).tolist()]
        given = position if total is None else min(position, max(0, total - SHUFFLE_BUFFER))
        # One by one they would be the same numbers.
        slots = held_after(randint(SHUFFLE_BUFFER, (given,), generator=drawn))
        pairs = self._decided(order, slots.sort().values.tolist())
        held = list(islice(pairs, SHUFFLE_BUFFER))
        if given and len(held) < SHUFFLE_BUFFER:
            # The epoch ends before that; its length is known now.
            yield from self._shuffled(epoch, position)
            return
        held = [held[i] for i in slots.argsort().argsort().tolist() if i < len(held)]
        for pair in pairs:
            i = int(randint(SHUFFLE_BUFFER, (), generator=drawn))
            yield held[i]
            held[i] = pair
        for i in randperm(len(held), generator=drawn).tolist()[position - given :]:
            yield held[i]

    def _decided(self, shards: list[int], held: list[int]) -> Iterator[NumberedRow]:
        """Read the decided pairs of shards: those whose numbers are `held`, ascending, and all
        after them. A shard without any of these is not opened where its length is known."""
        rows, known, wanted = self.source.rows, self.counts.known, set(held)
        start, after = 0, held[-1] + 1
        for shard in shards:
            end = start + known.get(shard, after + 1)
            if end <= max(start, after) and bisect_left(held, start) == bisect_left(held, end):
                start = end
                continue
            at = start
            for index, row in enumerate(self._read(shard)):
                number = index if rows.num_shards == 1 else f"{index} of shard {shard}"
                if is_wanted(row, number, self.config.data.dreamlike_pairs_only):
                    if at >= after or at in wanted:
                        yield number, row
                    at += 1
            self.counts.note(shard, at - start)
            start = at

    def _read(self, shard: int) -> Iterator[dict[str, Any]]:
        """Read the rows of one shard.

        Raises:
            UserError: its file is broken, or not to be reached any more.
        """
        rows, data = self.source.rows, self.config.data
        try:
            yield from rows.shard(rows.num_shards, shard)
        except UserError:
            raise
        # Of arrow, of the hub's client and of the file system.
        except Exception as error:
            raise UserError(
                f"--streaming: cannot read shard {shard} of {data.location} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error


class OwnShards(StreamingPairs):
    """Read the batches of one process from its own files (--stream_shards own): file s is read by
    process s modulo their number.

    Nothing is read twice, but the pairs of a step depend on the number of processes, and files of
    different length come to their end at different steps. A process then begins its own again, in
    another order, while the run's count of epochs stays at 0.

    Raises:
        UserError: there are fewer files than processes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shards) < self.world_size:
            raise UserError(
                f"--stream_shards own: {len(self.shards)} files cannot be shared out to "
                f"{self.world_size} processes; use --stream_shards all"
            )
        # `datasets.distributed.split_dataset_by_node` shares out rows, not files, where the number
        # of files is no multiple of the processes.
        self.shards = self.shards[self.rank :: self.world_size]
        # Within its own files a process is alone: its stream has a step of one batch.
        self.stride_of_run = self.stride
        self.rank, self.stride = 0, self.batch_size
        self.start = Place(0, self.start.position // self.stride_of_run * self.batch_size)

    def _key(self, epoch: int, position: int) -> Key:
        step, index = divmod(position, self.batch_size)
        of_run = step * self.stride_of_run + self.rank_of_run * self.batch_size + index
        return self.seed, epoch, of_run

    def _pairs_of(self, epoch: int, position: int = 0) -> Iterator[NumberedRow]:
        """Read the own files in one order after another, without end."""
        for turn in count():
            yield from self._shuffled(turn, position)
            total = self.counts.total(self.shards)  # now that all are read
            if not total:
                raise UserError(
                    f"--stream_shards own: no usable pair in the files of process "
                    f"{self.rank_of_run}; use --stream_shards all"
                )
            position = max(0, position - total)


def held_after(draws: Tensor) -> Tensor:
    """Tell which pairs, by the order in which they are read, the shuffle's slots hold after some
    draws, (SHUFFLE_BUFFER,) int64. Draw t gives away the pair in slot draws[t], and pair
    SHUFFLE_BUFFER + t takes the slot."""
    taken_by = arange(SHUFFLE_BUFFER, SHUFFLE_BUFFER + len(draws))
    return arange(SHUFFLE_BUFFER).scatter_reduce(0, draws, taken_by, "amax")


def is_wanted(row: dict[str, Any], number: int | str, dreamlike_only: bool = False) -> bool:
    """Tell whether a row is a decided pair (and, where asked for, of dreamlike models alone).

    Raises:
        UserError: its label does not lie between 0 and 1.
    """
    label = read_label(number, row[LABEL])
    if label is None or label == 0.5:
        return False
    if not 0 <= label <= 1:
        raise UserError(bad_label(number, label))
    return not dreamlike_only or all(DREAMLIKE in (row[model] or "") for model in MODELS)

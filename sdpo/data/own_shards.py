"""--stream_shards own: every process reads only its own share of a stream's files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from sdpo.common.errors import UserError
from sdpo.common.randomness import Key
from sdpo.data.order import Place
from sdpo.data.pairs import NumberedRow
from sdpo.data.stream import StreamingPairs, shuffled_pairs


class OwnShards(StreamingPairs):
    """Batches of one process from its own files: file s is read by process s modulo their number.

    Nothing is read twice, but the pairs of a step depend on the number of processes, and files of
    different length come to their end at different steps. A process then begins its own again, in
    another order, while the run's count of epochs stays at 0.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        shards, processes = self.source.rows.num_shards, self.stride // self.batch_size
        if shards < processes:
            raise UserError(
                f"--stream_shards own: {shards} files cannot be shared out to {processes} "
                "processes; use --stream_shards all"
            )
        self.shards = range(self.rank, shards, processes)
        # Within its own files a process is alone: its stream has a step of one batch.
        self.rank_of_run, self.stride_of_run = self.rank, self.stride
        self.rank, self.stride = 0, self.batch_size
        steps_done = self.start.position // self.stride_of_run
        self.start = Place(0, steps_done * self.batch_size)

    def _key(self, epoch: int, position: int) -> Key:
        step, index = divmod(position, self.batch_size)
        of_run = step * self.stride_of_run + self.rank_of_run * self.batch_size + index
        return self.seed, epoch, of_run

    def _pairs_of(self, epoch: int) -> Iterator[NumberedRow]:
        """Without end: one order after another of the own files."""
        for turn in count():
            found = False
            for item in shuffled_pairs(
                self.source.rows, self.seed, turn, self.dreamlike_only, self.shards
            ):
                found = True
                yield item
            if not found:
                raise UserError(
                    f"--stream_shards own: no usable pair in the files of process "
                    f"{self.rank_of_run}; use --stream_shards all"
                )

"""Batches of several processes, of which one that gets none does not leave the others waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError
from sdpo.common.processes import together

if TYPE_CHECKING:
    from sdpo.data.pairs import Batch
    from sdpo.training.state import Session


class SharedBatches(Iterator["Batch"]):
    """Give the batches of one process. Where they end in an error (a data worker killed, too many
    images that cannot be decoded), it is kept as `Session.data_error` and the last batch given
    again: the process takes part in the step that is under way, whose end tells all processes to
    drop it (`Step.reduce`).

    Raises:
        UserError: the process is alone, or none got as far as a first batch.
    """

    def __init__(self, batches: Iterator[Batch], run: Session) -> None:
        self._batches, self._run = batches, run
        self._last: Batch | None = None

    def __next__(self) -> Batch:
        if self._last is None:
            self._last = together(lambda: next(self._batches))
        elif self._run.data_error is None:
            try:
                self._last = next(self._batches)
            except UserError as error:
                if self._run.accelerator.num_processes == 1:
                    raise
                self._run.data_error = str(error)
        return self._last

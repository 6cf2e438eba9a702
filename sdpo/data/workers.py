"""Data workers that outlive a signal to the whole group, and whose death is one sentence."""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

from sdpo.common.errors import UserError, first_line
from sdpo.common.signals import leave_stops_to_parent

_LOST = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """Give a loader's batches.

    Raises:
        UserError: one that a worker raised, or a worker was killed.
    """
    if loader.num_workers:
        loader.worker_init_fn = leave_stops_to_parent
    before = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    # Left to multiprocessing, they would be sent the SIGTERM that they ignore, and waited for.
    workers = set(multiprocessing.active_children()) - others
    Finalize(None, _end, args=(workers,), exitpriority=0)
    if threading.current_thread() is threading.main_thread():
        # torch's own handler raises wherever the main thread happens to be, amid an optimizer step
        # as well; without it a worker's death is noticed where the next batch is waited for.
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:
            # A worker's error arrives wrapped in its traceback; the sentence is its last part.
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
        # torch's own error, or that of the connection by which a dying worker sent its batch.
        except (RuntimeError, EOFError, OSError) as error:
            if not (_LOST.search(str(error)) or _one_is_dead(workers)):
                raise
            raise UserError(
                f"a data worker was killed from outside ({first_line(error)}), as the system does "
                "where memory runs out: lower --dataloader_num_workers, or give the run more memory"
            ) from error
        yield batch


def _one_is_dead(workers: set[BaseProcess]) -> bool:
    for worker in workers:
        worker.join(timeout=0.2)
    return not all(worker.is_alive() for worker in workers)


def _end(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()

"""SIGTERM and SIGINT ask a run to save and stop; a later one ends it at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# `timeout` signals its child and then the child's group, a launcher passes on what the group got as
# well: what comes again within so many seconds is the same request.
SAME_REQUEST = 3.0


class StopRequest:
    """Installs the handlers; `signum` is None until a signal came."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __bool__(self) -> bool:
        return self.signum is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def exit_code(self) -> int:
        """The shell's code for an end by this signal; SIGTERM's where another process got it."""
        return 128 + (self.signum or signal.SIGTERM)


def leave_stops_to_parent(worker: int) -> None:
    """Ignore SIGTERM and SIGINT in data worker number `worker` (a `worker_init_fn`): sent to a
    whole process group, they are the main process's to answer; workers end when that has."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as an exception, so that its programs can be told."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""SIGTERM and SIGINT ask a run to save and stop; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Installs the handlers; `signum` is None until a signal came."""

    def __init__(self) -> None:
        self.signum: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __bool__(self) -> bool:
        return self.signum is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signum = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def exit_code(self) -> int:
        """The shell's code for an end by this signal; SIGTERM's where another process got it."""
        return 128 + (self.signum or signal.SIGTERM)


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

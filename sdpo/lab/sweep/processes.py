"""Programs that run side by side, each with a log of its own, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path


class Stopped(Exception):
    """The programs were told to end."""


class Children:
    """Runs programs from several threads.

    They get `threads` threads each where OMP_NUM_THREADS does not say how many, and sessions of
    their own: a Ctrl-C reaches them once, through `stop`, so that training saves. They keep the
    file `lock` open, so that a lock on it lasts until the last of them has ended, whatever became
    of this process.
    """

    def __init__(self, threads: int, lock: int) -> None:
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self._lock_file = lock
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._guard = threading.Lock()

    def run(self, command: list[str], log: Path) -> int:
        """Run one program to its end, its output added to `log`; returns its exit code.

        Raises:
            Stopped: `stop` was called.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            with self._guard:
                if self._stopped:
                    raise Stopped
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                    pass_fds=(self._lock_file,),
                )
                self._running.add(child)
            code = child.wait()
        with self._guard:
            self._running.discard(child)
            if self._stopped:
                raise Stopped
        return code

    def stop(self) -> None:
        """Tell all to end, and start no more."""
        with self._guard:
            self._stopped = True
            for child in self._running:
                child.send_signal(signal.SIGTERM)


def last_line(log: Path) -> str:
    """The last line of a log that says something; progress bars rewrite theirs after a \\r."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")

"""Programs run as parts of another: side by side, ended together."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.signals import terminable


class Stopped(Exception):
    """The programs were told to end."""


class Programs:
    """Runs programs from several threads and ends them together.

    Args:
        options: those of `subprocess.Popen`, for every program. With start_new_session a Ctrl-C
            reaches the programs once, through `stop`; without, they get it from the terminal.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._guard = threading.Lock()

    def run(
        self, command: list[str], log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> int:
        """Run one program to its end, its output added to `log`, with further variables in its
        environment; returns its exit code.

        Raises:
            Stopped: `stop` was called.
        """
        options = dict(self._options)
        if env:
            options["env"] = {**options.get("env", os.environ), **env}
        if log is None:
            return self._run(command, options)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            options |= {"stdout": file, "stderr": subprocess.STDOUT}
            return self._run(command, options)

    def _run(self, command: list[str], options: dict[str, Any]) -> int:
        with self._guard:
            if self._stopped:
                raise Stopped
            program = subprocess.Popen(command, **options)
            self._running.add(program)
        code = program.wait()
        with self._guard:
            self._running.discard(program)
            if self._stopped:
                raise Stopped
        return code

    def stop(self) -> None:
        """Tell all to end (SIGTERM), and start no more."""
        with self._guard:
            self._stopped = True
            for program in self._running:
                program.terminate()

    @contextmanager
    def threads(self, jobs: int) -> Iterator[ThreadPoolExecutor]:
        """Give a pool of `jobs` threads to run programs from. What ends the block early (an error,
        Ctrl-C, SIGTERM, SIGHUP) ends the programs first, and is raised when they have ended."""
        with terminable(), ThreadPoolExecutor(jobs) as pool:
            try:
                yield pool
            except BaseException as reason:
                told_already = not self._options.get("start_new_session")
                if not (isinstance(reason, KeyboardInterrupt) and told_already):
                    self.stop()
                raise


def run_step(command: list[str], what: str, **options: Any) -> None:
    """Run one program by `run_together`."""
    run_together({what: command}, **options)


def run_together(commands: Mapping[str, list[str]], **options: Any) -> None:
    """Run programs side by side, their output on the terminal, until all have ended.

    Args:
        commands: by what each is, for the message.
        options: those of `subprocess.Popen`.

    Raises:
        UserError: one ended with an error, which it has printed.
    """
    programs = Programs(**options)
    with programs.threads(len(commands) or 1) as pool:
        codes = dict(zip(commands, pool.map(programs.run, commands.values()), strict=True))
    for what, code in codes.items():
        if code:
            raise UserError(f"{what} ended with exit code {code}; see above, then run this again")

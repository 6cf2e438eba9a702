"""Scoring images while they are made, by a process of its own.

Nothing depends on it: it leaves tables of scores as the pass after the generation reads and writes
them, and what is missing there, for whatever reason, that pass scores.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sdpo.common.errors import UserError
from sdpo.common.processes import leave_launcher, start
from sdpo.evaluation.generate.manifest import Entry, Manifest
from sdpo.evaluation.generate.run import is_whole
from sdpo.evaluation.score.config import ScoreOptions

if TYPE_CHECKING:
    from sdpo.evaluation.score.scoring import Scoring

PAUSE = 1.0  # seconds between two looks at the image folders
PATIENCE = 10.0  # seconds of waiting for the last scores without a word


class Beside:
    """A process that scores what is there of manifests that need not be written yet.

    To be left as a context: without an error it waits until every image is scored, with one it ends
    the process. With this process the other one ends too.

    Args:
        manifests: all images that there will be.
        log: the file that takes its output.
    """

    def __init__(
        self, manifests: list[Manifest], scorers: list[str], options: ScoreOptions, log: Path
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        theirs, self._told = spawn.Pipe(duplex=False)
        self._log = log
        self._process = spawn.Process(
            target=_work, args=(theirs, manifests, scorers, options, log), daemon=True
        )
        self._process.start()
        theirs.close()

    def begun(self, number: int | None) -> None:
        """Tell it that images of the manifest of this number are made from now on; None: that there
        will be no more of any."""
        with suppress(OSError):  # it is gone; `__exit__` says so
            self._told.send(number)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._process.terminate()
            self._process.join()
            return
        self.begun(None)
        self._process.join(PATIENCE)
        if self._process.is_alive():
            print(f"scoring the images that are left (see {self._log})", flush=True)
            self._process.join()
        if self._process.exitcode:
            print(
                f"--score_beside ended early (exit code {self._process.exitcode}, see {self._log}):"
                " the images that it has left are scored now",
                flush=True,
            )


def _work(
    told: Connection,
    manifests: list[Manifest],
    scorers: list[str],
    options: ScoreOptions,
    log: Path,
) -> None:
    # A terminal sends it to both; the parent answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    leave_launcher()
    # Its own is a named semaphore, which a process that is ended leaves behind.
    tqdm.set_lock(threading.RLock())
    from sdpo.evaluation.score.scoring import Scoring

    try:
        score_arriving(told, manifests, Scoring(scorers, options, start(), beside=True))
    except UserError as error:
        sys.exit(f"error: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def score_arriving(told: Connection, manifests: list[Manifest], scoring: Scoring) -> None:
    """Score images as they come, in whole batches, until `told` says that there will be no more.

    Whole, so that they are the batches of a pass over all images, the first one too, by which mixed
    precision is judged.

    Args:
        told: gives numbers of manifests whose images are made from then on, and None at the end.

    Raises:
        UserError: weights that are not to be had, or damaged.
    """
    suites: list[_Suite] = []
    number: int | None = -1
    while number is not None:
        if told.poll(PAUSE):
            number = told.recv()
            if number is not None:
                suites.append(_Suite(manifests[number], scoring))
        for suite in suites:
            suite.look()
        scoring.score([suite.table for suite in suites], whole_batches=number is not None)


class _Suite:
    """A suite's images: those that are there, in a table, and those that are not yet."""

    def __init__(self, manifest: Manifest, scoring: Scoring) -> None:
        self.stem, self.waiting = manifest.stem, manifest.entries
        self.table = scoring.read(Manifest(manifest.path, self._arrived()))

    def look(self) -> None:
        """Add what has come."""
        if arrived := self._arrived():
            self.table.add(arrived)

    def _arrived(self) -> list[Entry]:
        names = set(os.listdir(self.waiting[0].image.parent)) if self.waiting else set()
        arrived: list[Entry] = []
        waiting: list[Entry] = []
        for entry in self.waiting:
            there = entry.image.name in names and is_whole(entry.image)
            (arrived if there else waiting).append(entry)
        self.waiting = waiting
        if arrived:
            print(f"{self.stem}: {len(arrived)} images, {len(waiting)} to come", flush=True)
        return arrived

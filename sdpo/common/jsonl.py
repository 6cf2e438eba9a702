"""Files of JSON lines that grow by whole lines and survive being cut off."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class JsonLines:
    """Appends entries to a file of JSON lines, each flushed as it is written.

    Of what is there already, a line that a kill cut off is dropped, and what follows the entries
    that `keep` takes, which must come first; the others stay as they are and are not read.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115
        self._file.truncate(_end_of_kept(self._file, keep))
        if not _ends_a_line(self._file):
            self._file.write(b"\n")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; what is not finite becomes null."""
        self._file.write(json_line(entry).encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CountedLines(JsonLines):
    """Appends to JSON lines of which it knows the number, `count`; the file is read once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.count = len(read_lines(path))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; what is not finite becomes null."""
        super().write(entry)
        self.count += 1


def _end_of_kept(file: BinaryIO, keep: Callable[[dict[str, Any]], bool] | None) -> int:
    """Find where the last whole line ends that `keep` takes, by halving: a few lines are read, of
    however many."""
    start, end = 0, file.seek(0, os.SEEK_END)
    while start < end:
        middle = (start + end) // 2
        file.seek(max(0, middle - 1))
        if middle:
            file.readline()  # now at the first line that begins at `middle` or after it
        if _is_kept(file.readline(), keep):
            start = file.tell()
        else:
            end = middle
    return start


def _is_kept(line: bytes, keep: Callable[[dict[str, Any]], bool] | None) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # cut off, or past the last
        return False
    return keep is None or keep(entry)


def _ends_a_line(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file of JSON lines, up to one that was cut off; [] where there is
    no file."""
    entries: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def json_line(entry: dict[str, Any]) -> str:
    """Write an entry as one line of JSON, which has no NaN or infinity: they become null."""
    return json.dumps(_plain(entry)) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Files of JSON lines that grow by whole lines and survive being cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdpo.common.files import write_text


class JsonLines:
    """Appends entries to a file of JSON lines, each flushed as it is written.

    Of what is there already, a line that a kill cut off is dropped, and so are the entries that
    `keep` refuses; the others stay as they are. `count` is the number of the file's lines.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        kept = [line for line, entry in _whole_lines(path) if keep is None or keep(entry)]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.count = len(kept)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; what is not finite becomes null."""
        self._file.write(json_line(entry))
        self._file.flush()
        self.count += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file of JSON lines; [] where there is none."""
    return [entry for _, entry in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each line and what it holds, up to one that was cut off."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield line, json.loads(line)
        except ValueError:
            return


def json_line(entry: dict[str, Any]) -> str:
    """Write an entry as one line of JSON, which has no NaN or infinity: they become null."""
    return json.dumps(_plain(entry)) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

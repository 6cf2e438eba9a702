"""A file of JSON lines that grows by whole lines and survives being cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpo.common.files import write_text
from sdpo.training.runlog import read_metrics


class Lines:
    """What is there already, without a line that a kill cut off, and a way to add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_metrics(path)
        if path.is_file():
            write_text(path, "".join(_line(entry) for entry in self.entries))

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line; it is on its way to the disk when this returns."""
        self.entries.append(entry)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(entry))

    def __len__(self) -> int:
        return len(self.entries)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"

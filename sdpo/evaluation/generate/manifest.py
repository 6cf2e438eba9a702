"""The manifest: which image was made from which prompt, in the published format.

`NAME.json` is a list of {prompt, gen_image_path, raw_image_path, metadata}; the images lie in the
folder `NAME/` beside it. Paths are written relative to the manifest, so both can be moved together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import write_json


@dataclass(frozen=True)
class Entry:
    """Names an image and its prompt; `image` is where it was found, as reachable from here."""

    prompt: str
    image: Path
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def category(self) -> str | None:
        """The prompt's category in its suite; None where that has none."""
        return self.metadata.get("category")


@dataclass(frozen=True)
class Manifest:
    """Holds a manifest that was read, and found to be whole."""

    path: Path
    entries: list[Entry]

    @property
    def stem(self) -> str:
        """The name shared by manifest, image folder and score files."""
        return self.path.stem

    @property
    def prompts(self) -> list[str]:
        """One a row, in the manifest's order."""
        return [entry.prompt for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; images are looked for, not opened.

    Raises:
        UserError: no such file, not a list of entries, a key is missing, an image is not there;
            names the row (from 0).
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no manifest {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is not a manifest: it must be a list of at least one image")
    return Manifest(path, [_entry(path, number, row) for number, row in enumerate(rows)])


def _entry(path: Path, number: int, row: Any) -> Entry:
    if not isinstance(row, dict):
        raise UserError(f"{path}, row {number}: must be an object, found {type(row).__name__}")
    for key in ("prompt", "gen_image_path"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{path}, row {number}: the key {key} is missing or not text")
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path}, row {number}: metadata must be an object")
    return Entry(row["prompt"], _find_image(path, number, row["gen_image_path"]), metadata)


def _find_image(path: Path, number: int, written: str) -> Path:
    """Relative to the manifest; else in the folder of its name (published manifests hold paths of
    the machine they were made on); else as written."""
    if not written:
        raise UserError(f"{path}, row {number}: gen_image_path is empty: no image was generated")
    candidates = (
        path.parent / written,
        path.with_suffix("") / Path(written).name,
        Path(written),
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}, row {number}: there is no image {candidates[0]}")


def write_manifest(path: Path, rows: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Write a manifest whole, of rows (prompt, image path relative to the manifest, metadata)."""
    entries = [
        {"prompt": prompt, "gen_image_path": image, "raw_image_path": "", "metadata": metadata}
        for prompt, image, metadata in rows
    ]
    write_json(path, entries)

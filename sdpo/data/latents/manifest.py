"""List a cache's shards. A shard counts once its own entry is written, beside it and after it; when
a build ends the entries are gathered in manifest.json.

So any number of processes write shards without waiting for each other, and a kill at any moment
leaves each shard either finished or to be made again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import write_text
from sdpo.config.data import CACHE_FLAG

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
FORMAT = 1
LATENTS, TEXT = "latents", "text"


@dataclass(frozen=True)
class Shard:
    """Describe one file: `items` are in it, in order, row numbers of the dataset as it was given or
    digests of captions; `bad` are the rows of its range that cannot be decoded, and why."""

    kind: str
    file: str
    size: int  # bytes
    sha256: str
    items: list[Any]
    bad: dict[int, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Shard:
        """Undo `asdict` and JSON, which makes text of `bad`'s keys."""
        return cls(**{**value, "bad": {int(k): v for k, v in value["bad"].items()}})


@dataclass
class Manifest:
    """Say what a cache depends on (`key`), what training must know of it (`about`), its shards."""

    key: dict[str, Any]
    about: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Name the shards' files."""
        return [shard.file for shard in self.shards]

    def write(self, directory: Path) -> None:
        """Write manifest.json whole, one shard a line."""
        counts = {
            "rows": sum(len(s.items) for s in self.shards if s.kind == LATENTS),
            "bad_rows": sum(len(s.bad) for s in self.shards),
            "captions": sum(len(s.items) for s in self.shards if s.kind == TEXT),
        }
        head = {"format": FORMAT, "key": self.key, "about": self.about, "counts": counts}
        text = json.dumps(head, indent=2).removesuffix("\n}")
        lines = ",\n".join(json.dumps(asdict(shard)) for shard in self.shards)
        write_text(directory / MANIFEST_FILE, f'{text},\n  "shards": [\n{lines}\n  ]\n}}\n')


def read_manifest(directory: Path) -> Manifest | None:
    """Read manifest.json and the entries of finished shards that are not in it yet; None where
    there is no cache. Shards whose files are gone are left out, so that they are made again.

    Raises:
        UserError: unreadable, of another format, or a shard is not as long as it was.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = value["format"]
        shards = {shard["file"]: Shard.from_json(shard) for shard in value["shards"]}
        for entry in _shard_files(directory, ".json"):
            shard = Shard.from_json(json.loads(entry.read_text(encoding="utf-8")))
            shards.setdefault(shard.file, shard)
        key, about = value["key"], value["about"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{CACHE_FLAG}: {path} cannot be read ({error}); delete the directory to have its "
            "content made anew"
        ) from None
    if found != FORMAT:
        raise UserError(
            f"{CACHE_FLAG}: {directory} holds a cache of format {found}, this version reads "
            f"{FORMAT}; give another directory"
        )
    return Manifest(key, about, [s for s in shards.values() if _is_whole(directory, s)])


def _is_whole(directory: Path, shard: Shard) -> bool:
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        log.warning("%s is gone: what was in it is encoded again", path)
        return False
    if size != shard.size:
        raise damaged(path, f"it has {size} bytes, not {shard.size}")
    return True


def damaged(path: Path, what: str) -> UserError:
    """Make the error that says that a shard is not what it was."""
    return UserError(f"{CACHE_FLAG}: {path} is damaged: {what}; delete it to have it made again")


def entry_path(directory: Path, file: str) -> Path:
    """Say where a shard's own entry stands until a build gathers them."""
    return (directory / file).with_suffix(".json")


def _shard_files(directory: Path, suffix: str = "") -> list[Path]:
    """Find shards, their entries and what a killed build left of them; or those of a suffix."""
    return [p for kind in (LATENTS, TEXT) for p in sorted(directory.glob(f"{kind}-*{suffix}"))]


def start_manifest(directory: Path, key: dict[str, Any], about: dict[str, Any]) -> Manifest:
    """Begin a cache: write a manifest without shards.

    Raises:
        UserError: there are shards, of which nobody knows what they were made from.
    """
    left = _shard_files(directory)
    if left:
        raise UserError(
            f"{CACHE_FLAG}: {directory} has {left[0].name} but no {MANIFEST_FILE}; give another "
            "directory"
        )
    manifest = Manifest(key, about)
    manifest.write(directory)
    return manifest


def gather_entries(directory: Path) -> Manifest:
    """Put every finished shard into manifest.json and delete the entries; by one process alone."""
    manifest = read_manifest(directory)
    assert manifest is not None
    manifest.shards.sort(key=lambda shard: shard.file)
    manifest.write(directory)
    for path in _shard_files(directory, ".json"):
        path.unlink()
    return manifest


def clear_unfinished(directory: Path, manifest: Manifest) -> None:
    """Delete what a killed build left: files that no entry names. By one process alone."""
    known = {*manifest.files, *(entry_path(directory, file).name for file in manifest.files)}
    for path in _shard_files(directory):
        if path.name not in known:
            path.unlink()

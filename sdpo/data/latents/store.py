"""Read and write the shards: pairs by their row, texts by their caption."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from sdpo.common.captions import mended
from sdpo.common.files import file_sha256, write_bytes, write_text
from sdpo.data.latents.manifest import LATENTS, TEXT, Manifest, Shard, damaged, entry_path

MOMENTS = "moments"
OPEN_FILES = 32  # memory-mapped at a time, in each process


def caption_digest(caption: str) -> str:
    """Make the 32 hex digits under which a caption is filed. One that ftfy mends is filed under
    what it becomes, so that texts of before it was mended are not taken."""
    text = mended(caption).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class LatentCache:
    """Read what there is of a cache. `bad` are rows that cannot be decoded, and why."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.about, self.shards = directory, manifest.about, manifest.shards
        self.bad = {row: reason for s in self.shards for row, reason in s.bad.items()}
        latents = [(i, s.items) for i, s in enumerate(self.shards) if s.kind == LATENTS]
        size = 1 + max((max(rows) for _, rows in latents if rows), default=-1)
        self._shard_of = np.full(size, -1, dtype=np.int32)
        self._place_of = np.zeros(size, dtype=np.int32)
        for i, rows in latents:
            self._shard_of[rows] = i
            self._place_of[rows] = np.arange(len(rows))
        self._texts = {
            digest: (i, place)
            for i, shard in enumerate(self.shards)
            if shard.kind == TEXT
            for place, digest in enumerate(shard.items)
        }
        self._files = _OpenFiles(directory)

    @property
    def summary(self) -> str:
        """Say what is there, for people."""
        pairs = int((self._shard_of >= 0).sum())
        size = sum(shard.size for shard in self.shards) / 2**30
        return (
            f"{pairs} pairs and {len(self._texts)} captions in {len(self.shards)} files, "
            f"{size:.2f} GiB; {len(self.bad)} pairs cannot be decoded"
        )

    def missing_rows(self, rows: np.ndarray) -> np.ndarray:
        """Choose those of `rows` that are neither encoded nor known to be bad."""
        known = np.append(np.flatnonzero(self._shard_of >= 0), [*self.bad]).astype(np.int64)
        return rows[~np.isin(rows, known)]

    def missing_captions(self, digests: Iterable[str]) -> list[str]:
        """Choose those digests whose captions are not encoded, in order."""
        return sorted(d for d in digests if d not in self._texts)

    def moments(self, row: int, flipped: bool = False) -> Tensor:
        """Read mean and standard deviation of the posteriors of a row's images 0 and 1, as they are
        kept, (2 images, 2, C, r, r)."""
        file = self.shards[self._shard_of[row]].file
        return self._files.tensors(file)[MOMENTS][int(self._place_of[row]), int(flipped)]

    def text(self, caption: str) -> dict[str, Tensor]:
        """Read what `Family.encode_text` gave of one caption, without the batch's dimension."""
        shard, place = self._texts[caption_digest(caption)]
        tensors = self._files.tensors(self.shards[shard].file)
        return {name: tensor[place] for name, tensor in tensors.items()}

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare one process's share of the shards with their checksums.

        Raises:
            UserError: naming the first that differs.
        """
        for shard in self.shards[rank::world_size]:
            path = self.directory / shard.file
            if file_sha256(path) != shard.sha256:
                raise damaged(path, "its sha256 is not the one in the manifest")


class _OpenFiles:
    """Keep the files used last memory-mapped. Each data worker opens its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "_open": OrderedDict()}

    def tensors(self, name: str) -> dict[str, Any]:
        """Give a file's tensors by name, each read where it is indexed.

        Raises:
            UserError: it is not a file of tensors.
        """
        if name not in self._open:
            path = self.directory / name
            try:
                file = safe_open(path, framework="pt")
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            except Exception as error:
                raise damaged(path, str(error)) from None
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            self._open[name] = slices
        self._open.move_to_end(name)
        return self._open[name]


def write_shard(
    directory: Path,
    kind: str,
    first: str,
    items: list[Any],
    tensors: dict[str, Tensor],
    bad: dict[int, str] | None = None,
) -> Shard:
    """Write a shard and then its entry. `first` names it among the others of its kind."""
    file = f"{kind}-{first}.safetensors"
    content = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
    write_bytes(directory / file, content)
    shard = Shard(kind, file, len(content), hashlib.sha256(content).hexdigest(), items, bad or {})
    write_text(entry_path(directory, file), json.dumps(asdict(shard)) + "\n")
    return shard

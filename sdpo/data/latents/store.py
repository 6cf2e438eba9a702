"""Reading and writing the shards: pairs by their row, texts by their caption."""

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

from sdpo.common.errors import UserError
from sdpo.common.files import file_sha256, write_bytes, write_text
from sdpo.data.latents.manifest import LATENTS, TEXT, Manifest, Shard, damaged, entry_path

MOMENTS = "moments"
OPEN_FILES = 32  # memory-mapped at a time, in each process


def caption_digest(caption: str) -> str:
    """What a caption is filed under, 32 hex digits."""
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class LatentCache:
    """What is there of a cache. `bad` are rows that cannot be decoded, and why."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.about, self.shards = directory, manifest.about, manifest.shards
        self.bad: dict[int, str] = {}
        latents = [(i, s) for i, s in enumerate(self.shards) if s.kind == LATENTS]
        for _, shard in latents:
            self.bad.update(shard.bad)
        size = 1 + max((max(s.items) for _, s in latents if s.items), default=-1)
        self._shard_of = np.full(size, -1, dtype=np.int32)
        self._place_of = np.zeros(size, dtype=np.int32)
        for i, shard in latents:
            self._shard_of[shard.items] = i
            self._place_of[shard.items] = np.arange(len(shard.items))
        self._texts = {
            digest: (i, place)
            for i, shard in enumerate(self.shards)
            if shard.kind == TEXT
            for place, digest in enumerate(shard.items)
        }
        self._files = _OpenFiles(directory)

    @property
    def summary(self) -> str:
        """What is there, for people."""
        pairs = int((self._shard_of >= 0).sum())
        size = sum(shard.size for shard in self.shards) / 2**30
        return (
            f"{pairs} pairs and {len(self._texts)} captions in {len(self.shards)} files, "
            f"{size:.2f} GiB; {len(self.bad)} pairs cannot be decoded"
        )

    def missing_rows(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that are neither encoded nor known to be bad."""
        known = np.zeros(max(len(self._shard_of), int(rows.max(initial=-1)) + 1), dtype=bool)
        known[: len(self._shard_of)] = self._shard_of >= 0
        bad = np.fromiter(self.bad, dtype=np.int64, count=len(self.bad))
        known[bad[bad < len(known)]] = True
        return rows[~known[rows]]

    def missing_captions(self, digests: Iterable[str]) -> list[str]:
        """Those digests whose captions are not encoded, in order."""
        return sorted(d for d in digests if d not in self._texts)

    def moments(self, row: int, flipped: bool = False) -> Tensor:
        """Of images 0 and 1 of a row the posterior's mean and standard deviation, as they are kept,
        (2 images, 2, C, r, r)."""
        shard, place = int(self._shard_of[row]), int(self._place_of[row])
        return self._files.slice(self.shards[shard].file, MOMENTS)[place, int(flipped)]

    def text(self, caption: str) -> dict[str, Tensor]:
        """`Family.encode_text` of one caption, without the batch's dimension, as it is kept."""
        shard, place = self._texts[caption_digest(caption)]
        file = self.shards[shard].file
        return {name: self._files.slice(file, name)[place] for name in self._files.names(file)}

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare one process's share of the shards with their checksums.

        Raises:
            UserError: naming the first that differs.
        """
        for shard in self.shards[rank::world_size]:
            path = self.directory / shard.file
            if file_sha256(path) != shard.sha256:
                raise UserError(damaged(path, "its sha256 is not the one in the manifest"))


class _OpenFiles:
    """The files used last, memory-mapped. Each data worker opens its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: OrderedDict[str, tuple[Any, dict[str, Any]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "_open": OrderedDict()}

    def _file(self, name: str) -> tuple[Any, dict[str, Any]]:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self.directory / name
        try:
            file = safe_open(path, framework="pt")
        except Exception as error:
            raise UserError(damaged(path, str(error))) from None
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)
        self._open[name] = (file, {key: file.get_slice(key) for key in file.keys()})  # noqa: SIM118
        return self._open[name]

    def slice(self, name: str, tensor: str) -> Any:
        """One tensor of a file, read where it is indexed."""
        return self._file(name)[1][tensor]

    def names(self, name: str) -> list[str]:
        """The names of a file's tensors."""
        return list(self._file(name)[1])


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

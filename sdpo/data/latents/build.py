"""Encode what a cache lacks, each process its share, shard by shard."""

from __future__ import annotations

import logging
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from sdpo.common.errors import UserError
from sdpo.common.images import UndecodableImage
from sdpo.common.precision import DTYPES
from sdpo.config import TrainConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.data.latents.manifest import LATENTS, TEXT
from sdpo.data.latents.store import MOMENTS, caption_digest, write_shard
from sdpo.data.loader import BadRowCounter
from sdpo.data.pairs import BadRow, PairDecoder, as_caption
from sdpo.data.source import PairSource
from sdpo.data.transforms import PairTransform, Shape
from sdpo.data.workers import batches_of
from sdpo.models.base import Family, Frozen, joined

log = logging.getLogger(__name__)

# Small enough to be lost in a kill without much regret, large enough for few files: 1000 pairs of
# SD1.5 at 512 px with flips, in bf16.
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Work:
    """List what a cache lacks: rows of the dataset, ascending, and captions."""

    rows: np.ndarray
    captions: list[str]

    def __bool__(self) -> bool:
        return bool(len(self.rows) or self.captions)


@dataclass(frozen=True)
class Builder:
    """Encode one process's share of some `Work` into `directory`."""

    directory: Path
    family: Family
    frozen: Frozen
    device: torch.device
    config: TrainConfig
    flips: bool
    rank: int = 0
    world_size: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Give the dtype of what is kept."""
        return DTYPES[self.config.data.cache_dtype]

    def build(self, work: Work, pairs: PairSource) -> None:
        """Write the missing shards of this process.

        Raises:
            UserError: too many images cannot be decoded, or an encoding does not fit the dtype.
        """
        if work.captions:
            self._texts(work.captions)
        self._latents(work.rows, pairs)

    def _texts(self, captions: list[str]) -> None:
        example = self._encode_texts([""])
        shards = self._share(captions, sum(tensor.nbytes for tensor in example.values()))
        with self._bar("caching captions", shards, "caption") as bar:
            for shard in shards:
                parts = []
                for chunk in _chunks(shard, 2 * self.config.data.cache_batch_size):
                    parts.append(self._encode_texts(chunk))
                    bar.update(len(chunk))
                digests = [caption_digest(caption) for caption in shard]
                write_shard(self.directory, TEXT, digests[0], digests, joined(parts))

    def _encode_texts(self, captions: list[str]) -> dict[str, Tensor]:
        encoded = self.family.encode_text(self.frozen, captions)
        return {name: self._kept(t, f"caption {captions[0]!r}") for name, t in encoded.items()}

    def _latents(self, rows: np.ndarray, pairs: PairSource) -> None:
        data = self.config.data
        side = data.resolution
        shards, shapes = [], []
        for (width, height), group in _by_shape(rows, pairs, (side, side)).items():
            latent = self.family.latent_shape(self.frozen, height, width)
            shape = (1 + self.flips, 2, 2, *latent)
            found = self._share(group, math.prod(shape) * self.dtype.itemsize)
            shards += found
            shapes += [shape] * len(found)
        decoder = PairDecoder(pairs.columns, pairs.base, PairTransform(data.resolution), 0.0)
        batches = [chunk for shard in shards for chunk in _chunks(shard, data.cache_batch_size)]
        images = DataLoader(
            _Images(pairs, decoder),
            batch_sampler=batches,
            num_workers=data.dataloader_num_workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
        )
        decoded = batches_of(images)
        counter = BadRowCounter(data.max_bad_fraction)
        with self._bar("caching latents", shards, "pair") as bar:
            for shard, shape in zip(shards, shapes, strict=True):
                moments = torch.empty((len(shard), *shape), dtype=self.dtype)
                kept: list[int] = []
                bad: dict[int, str] = {}
                while len(kept) + len(bad) < len(shard):
                    batch = next(decoded)
                    whole = {row: pixels for row, pixels in batch if isinstance(pixels, Tensor)}
                    broken = {row: reason for row, reason in batch if isinstance(reason, str)}
                    counter.update(len(batch), [BadRow(*item) for item in broken.items()])
                    if whole:
                        encoded = self._encode_images(torch.stack([*whole.values()]), [*whole])
                        moments[len(kept) : len(kept) + len(whole)] = encoded
                    kept += whole
                    bad |= broken
                    bar.update(len(batch))
                tensors = {MOMENTS: moments[: len(kept)]}
                write_shard(self.directory, LATENTS, f"{shard[0]:08d}", kept, tensors, bad)

    def _encode_images(self, pixels: Tensor, rows: list[int]) -> Tensor:
        """Encode pixels (n, 2, 3, H, W) to moments (n, views, 2 images, 2, C, h, w)."""
        both = pixels.flatten(0, 1).to(self.device)
        views = [both, both.flip(-1)] if self.flips else [both]
        encoded = []
        for view in views:
            mean, std = self.family.encode_posterior(self.frozen, view)
            encoded.append(torch.stack([mean, std], dim=1).unflatten(0, (-1, 2)))
        return self._kept(torch.stack(encoded, dim=1), f"rows {rows[0]} to {rows[-1]}")

    def _kept(self, encoded: Tensor, what: str) -> Tensor:
        kept = encoded.to("cpu", self.dtype)
        if not kept.isfinite().all():
            raise UserError(
                f"{CACHE_FLAG}: the encoding of {what} is not finite in --mixed_precision "
                f"{self.config.optim.mixed_precision} and --cache_dtype "
                f"{self.config.data.cache_dtype}; use bf16 for both, or a VAE that does not "
                "overflow"
            )
        return kept

    def _share(self, items: list[Any], item_bytes: int) -> list[list[Any]]:
        """Choose this process's shards, of a size that leaves none of the processes idle."""
        largest = max(1, SHARD_BYTES // item_bytes)
        size = max(1, min(largest, math.ceil(len(items) / self.world_size)))
        return _chunks(items, size)[self.rank :: self.world_size]

    def _bar(self, what: str, shards: list[list[Any]], unit: str) -> Any:
        total = sum(map(len, shards))
        return closing(tqdm(total=total, desc=what, unit=unit, disable=self.rank > 0 or not total))


@dataclass
class _Images(Dataset[tuple[int, Tensor | str]]):
    """Give the row of the dataset and the pixels (2, 3, H, W) of its images, or why it has none."""

    pairs: PairSource
    decoder: PairDecoder

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        try:
            images = self.decoder.images(self.pairs.given[row])
        except UndecodableImage as error:
            return row, str(error)
        shape = self.pairs.shape_of(row)
        return row, torch.stack([self.decoder.transform.centred(image, shape) for image in images])


def _by_shape(rows: np.ndarray, pairs: PairSource, square: Shape) -> dict[Shape, list[int]]:
    """Group rows by what they are cropped to."""
    groups: dict[Shape, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(pairs.shape_of(row) or square, []).append(row)
    return groups


def all_captions(pairs: PairSource) -> list[str]:
    """Collect every caption that the pairs can train with, each once, the empty one included.

    Raises:
        UserError: the column holds something else than text.
    """
    name = pairs.columns.caption
    found = {""}
    for batch in pairs.rows.select_columns([name]).iter(batch_size=1000):
        for value in batch[name]:
            several = value if isinstance(value, list | tuple) else [value]
            found.update(as_caption(caption, name) for caption in several)
    return sorted(found)


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]

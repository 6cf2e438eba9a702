"""Aspect buckets (--resize bucket): rectangles of about the square's area, of which each pair gets
the one whose shape is nearest to its images', so that little of a picture is cut away.

As in Podell et al., "SDXL", arXiv 2307.01952, section 2.3 and appendix I: sides are multiples of a
step, and ratios of width to height lie between 1 : 4 and 4 : 1.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdpo.common.files import write_bytes
from sdpo.common.images import READING, UndecodableImage, image_size
from sdpo.config.data import bucket_step
from sdpo.data.latents.identity import dataset_digest
from sdpo.data.source import ImageShapes, PairSource, arrow_column
from sdpo.data.transforms import Shape

if TYPE_CHECKING:
    import pyarrow as pa

    from sdpo.config import DataConfig

log = logging.getLogger(__name__)

LONGEST = 4  # width to height, and height to width
_READ_AT_ONCE = 4096  # pairs


def bucket_shapes(resolution: int) -> list[Shape]:
    """List the shapes (width, height) of about `resolution`^2 pixels, by ratio.

    Beside the square itself, sides are multiples of `bucket_step`.
    """
    step = bucket_step(resolution)
    longest = int(resolution * LONGEST**0.5)
    shapes = {(resolution, resolution)}
    for side in range(step, longest + 1, step):
        other = max(step, round(resolution**2 / side / step) * step)
        if side != other <= longest and max(side, other) <= LONGEST * min(side, other):
            shapes |= {(side, other), (other, side)}
    return sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape))


def choose_shapes(sizes: np.ndarray, resolution: int) -> np.ndarray:
    """Choose a shape for each pair: the one whose ratio's logarithm is nearest to the mean of its
    two images'.

    Args:
        sizes: width and height of image 0 and image 1, (n, 2, 2); 0 where they are not known.

    Returns:
        Widths and heights, (n, 2) int64. Of a pair of which one image is known, that one counts;
        pairs of which none is known get the most common shape.
    """
    shapes = np.array(bucket_shapes(resolution))
    known = sizes.min(axis=-1) > 0
    width, height = np.moveaxis(np.where(known[..., None], sizes, 1).astype(np.float64), -1, 0)
    ratios = np.log(width / height)  # 0 where not known
    means = ratios.sum(1) / np.maximum(known.sum(1), 1)
    distances = np.abs(means[:, None] - np.log(shapes[:, 0] / shapes[:, 1]))
    chosen = distances.argmin(1)
    some = known.any(1)
    if some.any():
        chosen[~some] = np.bincount(chosen[some]).argmax()
    return shapes[chosen]


def in_buckets(source: PairSource, data: DataConfig) -> PairSource:
    """Give pairs the shapes that --resize asks for; with crop they have none. The sizes of their
    images are read from the headers, and kept beside the dataset in the cache of `datasets`."""
    if data.resize == "crop" or source.shapes is not None:
        return source
    sizes = _sizes(source)
    shapes = choose_shapes(sizes, data.resolution)
    counts = Counter(map(tuple, shapes.tolist()))
    said = ", ".join(f"{w} x {h}: {counts[w, h]}" for w, h in sorted(counts))
    log.info("--resize bucket: pairs by width and height: %s", said)
    return replace(source, shapes=ImageShapes(shapes, sizes))


def shape_of_row(row: dict[str, Any], source: PairSource, resolution: int) -> Shape:
    """Choose the shape of one row, undecoded, of a source whose sizes are not known."""
    names = source.columns.image_0, source.columns.image_1
    sizes = [_size_of(lambda name=name: row[name], source.base) for name in names]  # type: ignore[misc]
    width, height = choose_shapes(np.array([sizes]), resolution)[0].tolist()
    return width, height


def _sizes(source: PairSource) -> np.ndarray:
    """Read widths and heights of the images of all pairs, (n, 2, 2) int64."""
    path = _kept_at(source)
    if path is not None and path.is_file():
        return np.load(path)
    columns = [
        arrow_column(source.given, name)
        for name in (source.columns.image_0, source.columns.image_1)
    ]

    def read(row: int) -> list[Shape]:
        return [_size_of(lambda c=c: _encoded(c[row]), source.base) for c in columns]  # type: ignore[misc]

    rows: list[int] = source.origin.tolist()
    found: list[list[Shape]] = []
    with ThreadPoolExecutor(8) as pool:  # of files on a network each takes a while
        for first in range(0, len(rows), _READ_AT_ONCE):
            found += pool.map(read, rows[first : first + _READ_AT_ONCE])
    sizes = np.array(found, dtype=np.int64)
    if path is not None:
        content = io.BytesIO()
        np.save(content, sizes)
        try:
            write_bytes(path, content.getvalue())
        except OSError as error:
            log.warning("the images' sizes are read anew by the next run: %s", error)
    return sizes


def _kept_at(source: PairSource) -> Path | None:
    """Name the file that keeps the sizes of these very rows; None where `datasets` has no files."""
    files = source.given.cache_files
    if not files:
        return None
    digest = hashlib.sha256(f"{READING} {dataset_digest(source)}".encode())
    digest.update(np.ascontiguousarray(source.origin).tobytes())
    return Path(files[0]["filename"]).parent / f"image-sizes-{digest.hexdigest()[:16]}.npy"


def _size_of(value: Callable[[], Any], base: Path | None) -> Shape:
    try:
        return image_size(value(), base)
    except UndecodableImage:
        return 0, 0


def _encoded(value: pa.Scalar) -> Any:
    """Give an Arrow value as `image_size` takes it; of bytes only what is read is touched."""
    import pyarrow as pa

    if isinstance(value, pa.StructScalar):
        parts = dict(value.items())
        content = parts.get("bytes")
        value = content if content is not None and content.is_valid else parts.get("path")
    if value is None or not value.is_valid:
        return None
    if pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type):
        return _BufferFile(value.as_buffer())
    return value.as_py()


class _BufferFile(io.RawIOBase):
    """Read a buffer as a file, without a copy of all of it; beyond its end there is nothing."""

    def __init__(self, buffer: pa.Buffer) -> None:
        self._view, self._at = memoryview(buffer), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def readinto(self, into: Any) -> int:
        part = self._view[self._at : self._at + len(into)]
        into[: len(part)] = part
        self._at += len(part)
        return len(part)

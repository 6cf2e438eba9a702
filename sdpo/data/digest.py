"""What tells the pairs of two runs apart, without reading an image."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.data.source import LABEL, PairSource, arrow_column
from sdpo.data.tables import content_digest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ASKED_ROWS = 10_000  # a network's file system can take a millisecond a file


def describe_pairs(source: PairSource) -> dict[str, Any] | None:
    """Count the chosen pairs and what they hold; of a stream, whose rows are not known, the files.

    Returns: numbers to name in a message, and a sha256 over row numbers, labels, captions and the
    sizes of the images, or over the files; None for a stream whose files are not known. Of images
    in files of their own those of `ASKED_ROWS` rows, spread evenly, are asked for their size.
    """
    if source.origin is None:
        return _describe_files(_stream_files(source.rows))
    import numpy as np
    import pyarrow as pa

    rows = pa.array(source.origin)
    labels = source.labels
    if labels is None:
        labels = arrow_column(source.given, LABEL).take(rows).cast(pa.float64()).to_numpy()
    captions = arrow_column(source.given, source.columns.caption).take(rows).to_pylist()
    asked = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ASKED_ROWS)).round().astype(int))
    columns = [
        arrow_column(source.given, name)
        for name in (source.columns.image_0, source.columns.image_1)
    ]
    found = [images_on_disk(column, source.base, source.origin[asked]) for column in columns]
    sizes = sum(each[source.origin].clip(0) for each, _ in found)
    in_files = any((times >= 0).any() for _, times in found)
    counted = f" in {ASKED_ROWS} rows" if in_files and len(rows) > ASKED_ROWS else ""
    digest = hashlib.sha256()
    for part in (np.asarray(source.origin), np.asarray(labels, np.float64), np.asarray(sizes)):
        digest.update(np.ascontiguousarray(part).tobytes())
    digest.update(repr(captions).encode("utf-8", "surrogatepass"))
    return {
        "pairs": len(captions),
        "first image preferred": int((np.asarray(labels) > 0.5).sum()),
        "characters of captions": sum(map(len, map(str, captions))),
        f"bytes of image data{counted}": int(np.sum(sizes)),
        "sha256": digest.hexdigest(),
    }


def last_writes(source: PairSource) -> list[int]:
    """List when the files of a stream on this machine were last written, in ns since 1970."""
    return [Path(n).stat().st_mtime_ns for n in _stream_files(source.rows) if "://" not in n]


def _describe_files(names: list[str]) -> dict[str, Any] | None:
    """Count files and hash their content; of those of the hub the names, which hold the commit."""
    digest, size = hashlib.sha256(), 0
    for name in names:
        is_local = "://" not in name
        digest.update((content_digest(Path(name)) if is_local else name).encode())
        size += Path(name).stat().st_size if is_local else 0
    return {"files": len(names), "bytes": size, "sha256": digest.hexdigest()} if names else None


def _stream_files(rows: Any) -> list[str]:
    """List the files that an `IterableDataset` reads; empty where it does not tell."""
    inner: Any = getattr(rows, "_ex_iterable", None)
    while hasattr(inner, "ex_iterable"):
        inner = inner.ex_iterable
    given = getattr(inner, "kwargs", {})
    names: list[str] = []
    for file in (*given.get("files", ()), *given.get("tar_paths", ())):
        names += [file] if isinstance(file, str) else map(str, file)  # datasets 4.0 wraps each
    for shard in given.get("shards", ()):
        is_tar = isinstance(shard, tuple)  # (path, digest) of `open_tars`
        names += [shard[0]] if is_tar else [file["filename"] for file in shard.cache_files]
    return names


def images_on_disk(
    column: pa.ChunkedArray, base: Path | None, asked: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Count the bytes of every image of a column, and say when it was changed in nanoseconds, each
    (rows,) int64; -1 where there is none. Of embedded images no byte is read, and they have no
    time; of others, in the rows `asked` (by default all), the file system is asked."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    is_path = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    content, paths = (None, column) if is_path else (column, None)
    if pa.types.is_struct(column.type):
        names = {member.name for member in column.type}
        content = pc.struct_field(column, "bytes") if "bytes" in names else None
        paths = pc.struct_field(column, "path") if "path" in names else None
    sizes, times = np.full((2, len(column)), -1, dtype=np.int64)
    if content is not None and (
        pa.types.is_binary(content.type) or pa.types.is_large_binary(content.type)
    ):
        sizes[:] = pc.fill_null(pc.binary_length(content), -1).to_numpy()
    if paths is not None:
        # An embedded image that came from a file keeps its name; the bytes are what counts.
        apart = np.flatnonzero(sizes <= 0)
        apart = apart if asked is None else np.intersect1d(apart, asked)
        for i, path in zip(apart, paths.take(pa.array(apart)).to_pylist(), strict=True):
            if path:
                sizes[i], times[i] = _size_and_time(base / path if base else Path(path))
    return sizes, times


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def changes(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in numbers how two descriptions differ; None if they do not, or are one of pairs and one
    of files. Of one that counted something else, as former versions did, the rest is compared."""
    if before.get("sha256") == now["sha256"] or ("files" in before) != ("files" in now):
        return None
    counts = [name for name in now if name != "sha256" and name in before]
    unlike = [f"{before[n]} {n}, now {now[n]}" for n in counts if before[n] != now[n]]
    if "files" in now:
        return "; ".join(unlike) or f"still {now['files']} files, but of other content"
    if unlike or before.keys() != now.keys():
        return "; ".join(unlike) or None
    return f"still {now['pairs']} pairs, but other rows, labels, captions or images"

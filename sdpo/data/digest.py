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


def describe_pairs(source: PairSource) -> dict[str, Any] | None:
    """Count the chosen pairs and what they hold; of a stream, whose rows are not known, the files.

    Returns: numbers to name in a message, and a sha256 over row numbers, labels, captions and the
    sizes of the images (a second for a million rows), or over the files; None for a stream whose
    files are not known.
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
    sizes = sum(
        _sizes(arrow_column(source.given, name))[source.origin]
        for name in (source.columns.image_0, source.columns.image_1)
    )
    digest = hashlib.sha256()
    for part in (np.asarray(source.origin), np.asarray(labels, np.float64), np.asarray(sizes)):
        digest.update(np.ascontiguousarray(part).tobytes())
    digest.update(repr(captions).encode("utf-8", "surrogatepass"))
    return {
        "pairs": len(captions),
        "first image preferred": int((np.asarray(labels) > 0.5).sum()),
        "characters of captions": sum(map(len, map(str, captions))),
        "bytes of images": int(np.sum(sizes)),
        "sha256": digest.hexdigest(),
    }


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


def _sizes(column: pa.ChunkedArray) -> np.ndarray:
    """The bytes of each value, or of its path; the values themselves are not touched."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind):
        fields = [kind.field(i).name for i in range(kind.num_fields)]
        return sum((_sizes(pc.struct_field(column, name)) for name in fields), _none(column))
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    return _none(column)


def _none(column: pa.ChunkedArray) -> np.ndarray:
    import numpy as np

    return np.zeros(len(column), np.int64)


def changes(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in numbers how two descriptions differ; None if they do not, or are one of pairs and one
    of files."""
    if before.get("sha256") == now["sha256"] or before.keys() != now.keys():
        return None
    counts = [name for name in now if name != "sha256"]
    unlike = [f"{before[n]} {n}, now {now[n]}" for n in counts if before[n] != now[n]]
    if "files" in now:
        return "; ".join(unlike) or f"still {now['files']} files, but of other content"
    same = f"still {now['pairs']} pairs, but other rows, labels, captions or images"
    return "; ".join(unlike) or same

"""What tells the pairs of two runs apart, without reading an image."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from sdpo.data.source import LABEL, PairSource, arrow_column

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def describe_pairs(source: PairSource) -> dict[str, Any] | None:
    """Count the chosen pairs and what they hold; None for a stream, whose rows are not known.

    Returns: numbers to name in a message, and a sha256 over row numbers, labels, captions and the
    sizes of the images (a second for a million rows).
    """
    if source.origin is None:
        return None
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
    """Say in numbers how two descriptions differ; None if they do not."""
    if before.get("sha256") == now["sha256"]:
        return None
    counts = [name for name in now if name != "sha256"]
    unlike = [f"{before.get(n)} {n}, now {now[n]}" for n in counts if before.get(n) != now[n]]
    same = f"still {now['pairs']} pairs, but other rows, labels, captions or images"
    return "; ".join(unlike) or same

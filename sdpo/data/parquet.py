"""Open parquet files whose types and columns may differ; their schemas are compared first."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdpo.common.errors import first_line
from sdpo.data.tables import content_digest

log = logging.getLogger(__name__)


def open_parquet(files: Sequence[str], cache_dir: str | None, streaming: bool) -> Any:
    """Open parquet files as a dataset of the columns that all of them have. Those without rows are
    passed over.

    What `datasets` has made of them before is taken again only where their content is the same.

    Raises:
        ValueError: a file that is none.
    """
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    files = _with_rows(files)
    options: dict[str, Any] = {}
    features = _common_features(files)
    if features is not None:
        options = {"features": features, "columns": list(features)}
    # Lists that are made already are not taken for patterns: [ and * in a name stay themselves.
    marks = [(str(os.stat(file).st_mtime_ns), content_digest(Path(file))) for file in files]
    data_files = DataFilesDict({"train": DataFilesList(list(files), marks)})
    builder = Parquet(cache_dir=cache_dir, data_files=data_files, **options)
    if streaming:
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _with_rows(files: Sequence[str]) -> list[str]:
    """Choose the files that hold rows.

    Raises:
        ValueError: none does, or one is not parquet.
    """
    chosen = []
    for file in files:
        try:
            if pq.read_metadata(file).num_rows:
                chosen.append(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: {first_line(error)}") from None
    if not chosen:
        raise ValueError(f"{files[0]} holds no rows")
    return chosen


def _common_features(files: Sequence[str]) -> Any:
    """Give the columns that all files have, in types that hold what each file has; None where all
    files have the same."""
    from datasets import Features

    found = [Features.from_arrow_schema(pq.read_schema(file)) for file in files]
    if all(list(each.items()) == list(found[0].items()) for each in found):
        return None
    common = {}
    for name in found[0]:
        kinds = [each[name] for each in found if name in each]
        wide = _wider(kinds)
        if len(kinds) == len(found) and wide is not None:
            common[name] = wide
    left_out = sorted({name for each in found for name in each} - set(common))
    if left_out:
        log.warning(
            "columns left out, since not all of the parquet files have them in one type: %s",
            ", ".join(left_out),
        )
    return Features(common)


def _wider(kinds: Sequence[Any]) -> Any:
    """Choose the feature that holds all of `kinds`; None where there is none."""
    from datasets import Image, Value

    kinds = [kind for kind in kinds if kind != Value("null")] or list(kinds)
    if all(kind == kinds[0] for kind in kinds):
        return kinds[0]
    if any(isinstance(kind, Image) for kind in kinds):
        others = [k for k in kinds if not isinstance(k, Image)]
        return Image() if all(isinstance(k, Value) for k in others) else None
    if not all(isinstance(kind, Value) for kind in kinds):
        return None
    types = [kind.pa_type for kind in kinds]
    for wide, kind_of in (
        ("int64", (pa.types.is_integer, pa.types.is_boolean)),
        ("float64", (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)),
        ("large_binary", (pa.types.is_binary, pa.types.is_large_binary)),
        ("large_string", (pa.types.is_string, pa.types.is_large_string)),
        ("string", (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)),
    ):
        if all(any(check(t) for check in kind_of) for t in types):
            return Value(wide)
    return None

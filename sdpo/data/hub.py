"""Open pairs of the hub, or of a mirror. Tables are read as local ones are (tables.py)."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from sdpo.common.errors import UserError, first_line
from sdpo.common.hub import look_for_hub
from sdpo.config import SourceConfig
from sdpo.config.data import MIRRORS
from sdpo.data.tables import LABEL, open_text

log = logging.getLogger(__name__)

# Options of a table's builder that its reader here knows, or that say nothing of how it is read.
_KNOWN = ("name", "version", "data_dir", "data_files", "description", "sep", "delimiter")


def open_hub(name: str, data: SourceConfig) -> Any:
    """Open a dataset of the hub, or where it is not to be had one of its mirrors.

    Raises:
        UserError: none of several can be opened.
    """
    names, failures = (name, *MIRRORS.get(name, ())), []
    for each in names:
        try:
            rows = _open_one(each, data)
        except UserError:
            raise
        except Exception as error:
            is_split = isinstance(error, ValueError) and "split" in str(error).lower()
            if len(names) == 1 or is_split:
                raise
            failures.append(f"{each} ({type(error).__name__}: {first_line(error)})")
            continue
        if failures:
            log.warning("cannot open %s; reading its mirror %s", ", nor ".join(failures), each)
        return rows
    raise UserError(
        f"{data.location_flag}: cannot open {', nor its mirror '.join(failures)}; give a local "
        f"copy with --train_data_dir DIR: {data.split}-00000-of-....parquet in DIR or DIR/data, "
        f"with the columns jpg_0, jpg_1, {LABEL} and caption (docs/DATA.md)"
    )


def _open_one(name: str, data: SourceConfig) -> Any:
    """Open a dataset as a `datasets.Dataset`; while streaming as a stream, unless it is a table."""
    look_for_hub()
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    builder = datasets.load_dataset_builder(
        name, data.dataset_config_name, cache_dir=data.cache_dir
    )
    if isinstance(builder, Csv | Json):
        return _open_table(builder, "csv" if isinstance(builder, Csv) else "json", name, data)
    if data.streaming:
        return builder.as_streaming_dataset(split=data.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=data.split)


def _open_table(builder: Any, kind: str, name: str, data: SourceConfig) -> Any:
    """Download the files of CSV or JSON and read them here: the readers of `datasets` take captions
    such as "NA" for missing and guess types from the first rows.

    Raises:
        UserError: no such split, or a layout that only those readers know.
    """
    import datasets

    config, splits = builder.config, {str(k): v for k, v in builder.config.data_files.items()}
    if data.split not in splits:
        raise UserError(f"--split: {name} has no split {data.split!r}; it has: {', '.join(splits)}")
    odd = [f.name for f in fields(config) if f.name not in _KNOWN]
    odd = [n for n in odd if getattr(config, n) != getattr(type(config)(), n)]
    if odd:
        raise UserError(
            f"{data.location_flag}: {name} is {kind.upper()} read with options of its own "
            f"({', '.join(odd)}); download it, save it as plain {kind.upper()} and give "
            "--train_data_dir"
        )
    manager = datasets.DownloadManager(
        dataset_name=builder.dataset_name,
        download_config=datasets.DownloadConfig(
            cache_dir=f"{data.cache_dir or datasets.config.HF_DATASETS_CACHE}/downloads"
        ),
    )
    names = [str(file) for file in splits[data.split]]
    paths = manager.download_and_extract(names)
    separator = str(getattr(config, "delimiter", None) or getattr(config, "sep", ","))
    return open_text(paths, None, data.cache_dir, names, kind, separator)

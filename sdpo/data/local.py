"""Find pairs on this machine's disk: parquet files, or a folder with a metadata file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sdpo.common.errors import UserError
from sdpo.config import DataConfig, SourceConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.models.locations import looks_local

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class LocalFiles(NamedTuple):
    """Name files for `datasets.load_dataset`; image paths are relative to `base`."""

    kind: str  # "parquet", "json" or "csv"
    files: list[str]
    base: Path


def find_local_files(directory: Path, split: str, flag: str) -> LocalFiles:
    """Find the files of one split in a local directory.

    `DIR/metadata.jsonl` (or .csv), `DIR/SPLIT/metadata.jsonl`, or parquet files in DIR or DIR/data:
    those whose name begins with the split's, or, where no name says a split, all of them.

    Raises:
        UserError: nothing of the kind is there; names `flag`.
    """
    for base in (directory / split, directory):
        for name in METADATA_NAMES:
            if (base / name).is_file():
                kind = "json" if name.endswith("jsonl") else "csv"
                return LocalFiles(kind, [str(base / name)], base)
    parquet = sorted([*directory.glob("*.parquet"), *directory.glob("data/*.parquet")])
    if not parquet:
        raise UserError(
            f"{flag}: {directory} holds neither parquet files nor {' or '.join(METADATA_NAMES)}"
        )
    chosen = [p for p in parquet if p.name.split("-")[0].split(".")[0] == split]
    if not chosen:
        named = sorted({p.name.split("-")[0].split(".")[0] for p in parquet})
        if len(named) < len(parquet) or any("-00" in p.name for p in parquet):
            raise UserError(
                f"--split: {directory} has no parquet files of split {split!r}; it has those of: "
                f"{', '.join(named)}"
            )
        chosen = parquet
    return LocalFiles("parquet", [str(p) for p in chosen], directory)


def check_data_location(data: SourceConfig) -> None:
    """Check that a local data directory exists and holds something that can be pairs.

    Raises:
        UserError: naming the flag.
    """
    flag, name = data.location_flag, data.location
    path = Path(name)
    if path.is_dir():
        find_local_files(path, data.split, flag)
    elif path.is_file():
        raise UserError(f"{flag}: {name} is a file; give the directory it lies in")
    elif data.train_data_dir or looks_local(name):
        raise UserError(f"{flag}: there is no directory {name}")


def check_cache_location(data: DataConfig) -> None:
    """Check that a cache of encodings is or can be a directory.

    Raises:
        UserError: naming the flag.
    """
    path = Path(data.cache_dir_latents or ".")
    if path.exists() and not path.is_dir():
        raise UserError(f"{CACHE_FLAG}: {path} is a file; give a directory")

"""Finding pairs on this machine's disk: parquet files, or a folder with a metadata file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sdpo.common.errors import UserError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class LocalFiles(NamedTuple):
    """`kind` as `datasets.load_dataset` knows it; image paths are relative to `base`."""

    kind: str  # "parquet", "json" or "csv"
    files: list[str]
    base: Path


def find_local_files(directory: Path, split: str, flag: str) -> LocalFiles:
    """The files of one split in a local directory.

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

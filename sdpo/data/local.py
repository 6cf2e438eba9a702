"""Find pairs on this machine's disk, and of several splits the one that is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.config import DataConfig, SourceConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.models.locations import looks_local

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
TEXT_SUFFIXES = (".jsonl", ".csv", ".json")
SAVED = "state.json"  # which `save_to_disk` of `datasets` writes
_SAVED_SPLITS = "dataset_dict.json"
_NO_TABLES = (SAVED, _SAVED_SPLITS, "dataset_info.json", "dataset_infos.json")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval", "heldout", "holdout")
# train-00000-of-00003[-0123456789abcdef]
_SHARD = re.compile(r"(.*?)[-_.]?(\d{3,})-of-(\d{3,})(?:-[0-9a-f]{8,})?", re.IGNORECASE)


class LocalFiles(NamedTuple):
    """Name the files of a split; image paths in them are relative to `base`."""

    # "metadata" or another "table" (JSON lines, JSON, CSV), "parquet", "saved" by `datasets`,
    # "folders" w and l, "tars"
    kind: str
    files: list[str]
    base: Path


def find_local_files(directory: Path, split: str, flag: str) -> LocalFiles:
    """Find the files of one split in a local directory.

    `DIR/metadata.jsonl` (or .csv), `DIR/SPLIT/metadata.jsonl`, or parquet files in DIR or DIR/data:
    those whose name begins with the split's (train-00000-of-00002, train_0), or, where no name says
    a split, all of them, which then are the split "train", or the one that DIR is named after; a
    dataset of `save_to_disk`; folders w and l; one table of another name; tar files likewise.

    Raises:
        UserError: nothing of the kind is there, or not of this split, or shards are missing; names
            `flag` or the files.
    """
    # A folder of the split's name holds the split itself, whatever its files are called.
    bases = [directory / split, directory]
    for find in (*_FINDERS[:-1], _find_table, _find_tars):
        if find is _find_parquet and any(
            _is_of(p, split) for p in _of_suffix(directory, ".parquet")
        ):
            bases = [directory]
        for base in bases:
            found = find(base)
            if found:
                return _of_split(found, directory, split, flag)
    folders = sorted(p for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
    elsewhere = [p.name for p in folders if any(find(p) for find in _FINDERS)]
    if elsewhere:
        raise UserError(
            f"--split: {directory} has no split {split!r}; it has: {', '.join(elsewhere)}"
        )
    raise UserError(
        f"{flag}: {directory} holds nothing that is read as pairs: {' or '.join(METADATA_NAMES)}, "
        "parquet files, tar files, one table (.jsonl, .csv, .json), folders w (winners) and l "
        "(losers), or what save_to_disk of datasets wrote"
    )


def _find_metadata(base: Path) -> LocalFiles | None:
    for name in METADATA_NAMES:
        for path in _files(base):
            if path.name.lower() == name:
                return LocalFiles("metadata", [str(path)], base)
    return None


def _find_saved(base: Path) -> LocalFiles | None:
    state = base / SAVED
    return LocalFiles("saved", [str(state)], base) if state.is_file() else None


def _find_folders(base: Path) -> LocalFiles | None:
    whole = (base / "w").is_dir() and (base / "l").is_dir()
    return LocalFiles("folders", [], base) if whole else None


def _find_parquet(base: Path) -> LocalFiles | None:
    files = _of_suffix(base, ".parquet")
    return LocalFiles("parquet", [str(p) for p in files], base) if files else None


def _find_table(base: Path) -> LocalFiles | None:
    for suffix in TEXT_SUFFIXES:
        files = [p for p in _files(base) if p.suffix.lower() == suffix and p.name not in _NO_TABLES]
        if files:
            return LocalFiles("table", [str(p) for p in files], base)
    return None


def _find_tars(base: Path) -> LocalFiles | None:
    files = _of_suffix(base, ".tar")
    return LocalFiles("tars", [str(p) for p in files], base) if files else None


_FINDERS = (_find_metadata, _find_saved, _find_parquet, _find_folders, _find_tars)


def _of_suffix(base: Path, suffix: str) -> list[Path]:
    files = [p for place in (base, base / "data") for p in _files(place)]
    return [p for p in files if p.suffix.lower() == suffix]


def _of_split(found: LocalFiles, directory: Path, split: str, flag: str) -> LocalFiles:
    """Keep of what was found in `directory`, or in its folder of the split's name, this split."""
    within = found.base == directory
    if found.kind in ("parquet", "table", "tars"):
        files = [Path(file) for file in found.files]
        chosen = _choose(directory, files, split, within)
        if found.kind == "table" and len(chosen) > 1 and not _SHARD.fullmatch(chosen[0].stem):
            several = ", ".join(p.name for p in chosen)
            raise UserError(
                f"{flag}: {found.base} holds several tables ({several}); leave one there, or call "
                f"it {METADATA_NAMES[0]}"
            )
        return found._replace(files=[str(p) for p in chosen])
    if not within:
        return found
    if found.kind == "saved":
        named = json.loads(Path(found.files[0]).read_text(encoding="utf-8")).get("_split")
        if named == split:
            return found
        if named and directory.resolve().name != split:
            raise UserError(f"--split: {directory} holds split {named!r} and not {split!r}")
    _check_unnamed_split(directory, split)
    return found


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_file()) if directory.is_dir() else []


def _check_unnamed_split(directory: Path, split: str) -> None:
    if split != "train" and directory.resolve().name != split:
        raise UserError(
            f"--split: nothing in {directory} names a split, so that its pairs are split 'train' "
            f"and not {split!r}; give --split train, or put those of {split!r} into "
            f"{directory / split}"
        )


def _choose(directory: Path, files: Sequence[Path], split: str, within: bool) -> list[Path]:
    """Choose a split's files by name; all, where no name says a split and the directory may hold
    this one (`within` it, and not in a folder of the split's name)."""
    chosen = [p for p in files if _is_of(p, split)]
    if not chosen:
        named = sorted({_split_names(p)[0] for p in files})
        # Tars are numbered under any name (shard-000000.tar).
        numbered = len(named) < len(files) or any("-00" in p.name for p in files)
        if within and (
            (numbered and files[0].suffix.lower() != ".tar")
            or any(re.split(r"[-_.]", name)[0] in _SPLIT_WORDS for name in named)
        ):
            kind = files[0].suffix.lower().lstrip(".")
            raise UserError(
                f"--split: {directory} has no {kind} files of split {split!r}; it has those "
                f"of: {', '.join(named)}"
            )
        if within:
            _check_unnamed_split(directory, split)
        chosen = list(files)
    _check_shards(chosen)
    return chosen


def _is_of(path: Path, split: str) -> bool:
    return split.lower() in _split_names(path)


def _split_names(path: Path) -> list[str]:
    """List what a file's name may call its split: without the shard's number, then with it."""
    stem = path.stem.lower()
    shard = _SHARD.fullmatch(stem)
    name = shard[1] if shard else stem
    family = re.sub(r"[-_.]?\d+$", "", name) or stem
    return [family, name, stem.split("-")[0].split(".")[0]]


def _check_shards(files: Sequence[Path]) -> None:
    """Refuse files of the form NAME-00000-of-00003 of which some are not there.

    Raises:
        UserError: naming a file that is.
    """
    sets: dict[tuple[str, int], dict[int, Path]] = {}
    for path in files:
        shard = _SHARD.fullmatch(path.stem)
        if shard:
            there = sets.setdefault((shard[1], int(shard[3])), {})
            twin = there.setdefault(int(shard[2]), path)
            if twin is not path:
                raise UserError(f"{twin} and {path} are the same shard: remove one of them")
    for (name, count), there in sets.items():
        first = next(iter(there.values()))
        missing = [i for i in range(count) if i not in there]
        if missing:
            raise UserError(
                f"{first}: of its {count} shards {len(missing)} are missing "
                f"(number {', '.join(map(str, missing[:5]))}{', ...' if missing[5:] else ''}); "
                "add them, or rename the files that are there if they are to stand alone"
            )
        others = [n for other, n in sets if other == name and n != count]
        if others:
            raise UserError(
                f"{first.parent}: the shards of {name!r} are divided twice, in {count} and in "
                f"{others[0]}; remove those that are out of date"
            )


def check_data_location(data: SourceConfig) -> None:
    """Check that a local data directory exists and holds something that can be pairs.

    Raises:
        UserError: naming the flag.
    """
    if data.image_root and not Path(data.image_root).is_dir():
        raise UserError(f"--image_root: there is no directory {data.image_root}")
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
    if data.cache_dir_latents:
        # One that is there may be complete.
        check_directory(Path(data.cache_dir_latents), CACHE_FLAG, to_write=False)

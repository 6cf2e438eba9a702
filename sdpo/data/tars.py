"""Read pairs from tar shards as the webdataset library lays them out: files of one stem are a row.

0001.jpg_0, 0001.jpg_1 and 0001.json, or 0001.0.png, 0001.1.png and 0001.txt: a column is called
what follows the stem. A JSON file's members are columns; text is read as tables are (tables.py).
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError, first_line
from sdpo.data.columns import CAPTIONS
from sdpo.data.tables import LABEL, as_text, content_digest, label_value, parse_json

# To be changed with what is made of a file.
_VERSION = "1"
_NAME = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")  # [folder/]stem.column
_TEXT = ("txt", "text", "caption", "prompt", "transcript", "cls", LABEL)
_JSON = ("json", "jsn")
_END = bytes(tarfile.BLOCKSIZE)
_LOOKED_AT = 64  # rows of the first shard, by which columns and their types are known

Row = dict[str, Any]


def open_tars(files: Sequence[str], cache_dir: str | None, streaming: bool) -> Any:
    """Open tar shards as a dataset, its images encoded bytes; streamed, a shard of it is a file.
    Otherwise `datasets` keeps the rows in its cache, by the content of the files.

    Raises:
        UserError: a file is damaged, or its rows do not lie together.
    """
    import datasets

    first = [row for _, row in islice(_rows_of(Path(files[0])), _LOOKED_AT)]
    if not first:
        raise UserError(f"{files[0]} holds no files that are called STEM.COLUMN, e.g. 0001.jpg_0")
    features = datasets.Features(_features(first))
    if streaming:
        shards: list[Any] = [(file, None) for file in files]
        return datasets.IterableDataset.from_generator(
            read_shards, features, {"shards": shards, "features": features}
        )
    shards = [(file, f"{_VERSION} {content_digest(Path(file))}") for file in files]
    try:
        return datasets.Dataset.from_generator(
            read_shards,
            features,
            cache_dir=cache_dir,
            gen_kwargs={"shards": shards, "features": features},
            writer_batch_size=100,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def read_shards(shards: Sequence[tuple[str, str | None]], features: Any) -> Iterator[Row]:
    """Read the rows of files, (path, digest), one after another, in the types of `features`."""
    for file, _ in shards:
        for stem, row in _rows_of(Path(file)):
            where = f"{file}, {stem}"
            yield {name: _typed(row.get(name), name, features[name], where) for name in features}


def _rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """Read a shard: stems, and what their files hold by column."""
    seen: set[str] = set()
    stem = ""
    row: Row = {}
    for name, content in _members(path):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if match[1] != stem:
            if row:
                yield stem, _captioned(row)
            stem, row = match[1], {}
            if stem in seen:
                raise UserError(
                    f"{path}: the files of {stem} do not lie together, as they must to be a row; "
                    "make it anew with the files in order of their names (tar --sort=name)"
                )
            seen.add(stem)
        for column, value in _columns(match[2].lower(), content, f"{path}, {name}"):
            if column in row:
                raise UserError(f"{path}: {stem} has {column} twice")
            row[column] = value
    if row:
        yield stem, _captioned(row)


def _captioned(row: Row) -> Row:
    """Take STEM.txt for the caption where a row has no other."""
    if "txt" in row and not row.keys() & {"caption", *CAPTIONS}:
        row["caption"] = row.pop("txt")
    return row


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
            # tarfile takes anything that is no header for the end.
            file.seek(tar.offset)
            if file.read(len(_END)) != _END:
                raise UserError(f"{path} is damaged or cut off: it lacks a tar file's end mark")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as a tar file: {first_line(error)}") from None


def _columns(name: str, content: bytes, where: str) -> Iterator[tuple[str, Any]]:
    """Give what a file's name and content make: one column, or a JSON object's members."""
    from PIL import Image

    rest, _, suffix = name.rpartition(".")
    if suffix not in _JSON + _TEXT:
        if rest and f".{suffix}" in Image.registered_extensions():
            name = rest
        yield (f"image_{name}" if name in ("0", "1") else name), content
        return
    try:
        text = content.decode("utf-8-sig")
        value = parse_json(text) if suffix in _JSON else text.removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8") from None
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from None
    if suffix in _TEXT:
        yield rest or suffix, value
    elif isinstance(value, dict):
        yield from value.items()
    else:
        raise UserError(f"{where} must hold an object of columns")


def _features(rows: Sequence[Row]) -> dict[str, Any]:
    from datasets import Value

    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, bytes) for value in values):
            found[name] = Value("binary")
        elif any(isinstance(value, list) for value in values):
            found[name] = [Value("string")]
        else:
            found[name] = Value("float64" if name == LABEL else "string")
    return found


def _typed(value: Any, name: str, feature: Any, where: str) -> Any:
    """Convert a column's value to its type.

    Raises:
        UserError: it is of another kind; begins with `where`.
    """
    if value is None:
        return None
    if isinstance(value, bytes) != (getattr(feature, "dtype", "") == "binary"):
        raise UserError(f"{where}: {name} is a file of its own in some rows and text in others")
    if name == LABEL:
        try:
            return label_value(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: {LABEL} is {value!r}; it must hold 0 (image 1 preferred), 0.5 (a tie) "
                "or 1 (image 0 preferred)"
            ) from None
    if getattr(feature, "dtype", "list") not in ("string", "binary"):
        return [as_text(each) for each in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, bytes) else as_text(value)

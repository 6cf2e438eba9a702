"""Read local tables of pairs so that every value is what the file says.

JSON lines, JSON lists and CSV are read here and not by `datasets`, whose readers guess a column's
type from its first rows and take captions such as "None" for missing. Here all values are text,
but for label_0.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdpo.common.errors import UserError, first_line

log = logging.getLogger(__name__)

LABEL = "label_0"
# To be changed with what is made of a file's text.
_VERSION = "1"
_MISSING_LABELS = frozenset(["", "na", "n/a", "nan", "null", "none", "<na>"])
_WORDS = {"true": 1.0, "false": 0.0}
_DIGESTED_WHOLE = 1 << 24  # bytes
_SAMPLES, _SAMPLE_SIZE = 64, 1 << 12

Record = tuple[int, dict[str, Any]]  # the line it begins in, counted from 1


def label_value(value: Any) -> float | None:
    """Read a label, a number or its text; None where there is none.

    Raises:
        ValueError: it is no number.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        return None if text in _MISSING_LABELS else float(_WORDS.get(text, text))
    return None if value is None else float(value)


def open_text(
    files: Sequence[str],
    base: Path | None,
    cache_dir: str | None,
    names: Sequence[str] | None = None,
    kind: str | None = None,
    separator: str = ",",
) -> Any:
    """Open JSON lines, JSON lists or CSV as a `datasets.Dataset`, kept as an Arrow file in the
    cache of `datasets`, by the content of the files.

    Args:
        names: of the files, for messages, where they lie under others.
        kind: "csv" or "json"; by default what the files' names end in.
        separator: of CSV's cells.

    Raises:
        UserError: a file that cannot be read; names it and the line.
    """
    contents = [Path(file).read_bytes() for file in files]
    names = names or files
    kind = kind or ("csv" if Path(names[0]).suffix.lower() == ".csv" else "json")
    about = [_VERSION, str(base.resolve()) if base else "", separator, kind, *names]
    digest = hashlib.sha256("\n".join(about).encode("utf-8", "surrogateescape"))
    for content in contents:
        digest.update(hashlib.sha256(content).digest())

    def table() -> pa.Table:
        records: list[Record] = []
        for name, content in zip(names, contents, strict=True):
            text = _decoded(name, content)
            if kind == "csv":
                records += _records_of_csv(name, text, separator)
            elif text.lstrip().startswith("["):
                records += _records_of_list(name, text)
            else:
                records += _records_of_lines(name, text)
        if not records:
            raise UserError(f"{names[0]} holds no rows")
        return to_table([record for _, record in records])

    return kept_table(table, digest.hexdigest(), cache_dir)


def kept_table(make: Any, digest: str, cache_dir: str | None) -> Any:
    """Open the Arrow file that the cache of `datasets` keeps under a digest as a
    `datasets.Dataset`; where there is none, it is written from the table that `make()` gives.

    Raises:
        UserError: it cannot be written.
    """
    import datasets

    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    path = root / "sdpo-tables" / digest[:32] / "rows.arrow"
    if not path.is_file():
        rows = make()
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_stream(file, rows.schema) as out:
                out.write_table(rows, max_chunksize=1000)
            os.replace(beside, path)
        except OSError as error:
            raise UserError(
                f"--cache_dir: cannot write {path}: {error.strerror or error}"
            ) from None
    return datasets.Dataset.from_file(str(path))


def _decoded(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file "
            "in UTF-8"
        ) from None


def parse_json(text: str) -> Any:
    """Parse JSON, its numbers as text: whether they are captions or labels their column tells."""
    numbers: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": str}
    return json.loads(text, object_pairs_hook=_members, **numbers)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


def _records_of_lines(path: str, text: str) -> Iterator[Record]:
    # Not splitlines: JSON allows U+2028 and its like within a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: {first_line(error)}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a row must be an object of columns")
        yield number, record


def _records_of_list(path: str, text: str) -> Iterator[Record]:
    try:
        records = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {number}: a row must be an object of columns")
        yield number, record


def _records_of_csv(path: str, text: str, separator: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise UserError(f"{path}: column {min(twice)!r} is there twice")
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has "
                    f"{len(header)} columns; put text that holds commas into quotes"
                )
            yield reader.line_num, {n: c or None for n, c in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def to_table(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Make a table of records: text or lists of text, label_0 as float64; what a record lacks is
    null."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {}
    for name in names:
        values = [record.get(name) for record in records]
        if name == LABEL:
            try:
                columns[name] = pa.array([label_value(v) for v in values], pa.float64())
                continue
            except (TypeError, ValueError):
                pass  # kept as text, for the sentence that names the row
        if any(isinstance(value, list) for value in values):
            lists = [v if isinstance(v, list) or v is None else [v] for v in values]
            cells: Any = [v if v is None else [as_text(x) for x in v] for v in lists]
            columns[name] = pa.array(cells, pa.list_(pa.string()))
        else:
            columns[name] = _objects(values) or _texts(values, name)
    return pa.table(columns)


def _objects(values: Sequence[Any]) -> pa.Array | None:
    """Make a column of JSON objects, where all values are such of members of one type; as a caption
    it is refused."""
    if not all(value is None or isinstance(value, dict) for value in values) or not any(values):
        return None
    try:
        return pa.array(values)
    except pa.ArrowException:
        return None


def _texts(values: Sequence[Any], name: str) -> pa.Array:
    texts = [as_text(value) for value in values]
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError as error:
        row = next(i for i, text in enumerate(texts) if text == error.object)
        raise UserError(
            f"row {row}: {name} holds half a character (\\u{ord(error.object[error.start]):04x})"
        ) from None


def as_text(value: Any) -> str | None:
    """Give a value of `parse_json` as text; what is no text as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)  # true, false, or an object


def open_folders(base: Path, cache_dir: str | None) -> Any:
    """Open folders w (preferred) and l of images of equal names, as kohya's scripts take them, with
    a caption beside each in a file of that name, .txt or .caption.

    Raises:
        UserError: an image without its counterpart or caption; names it.
    """
    sides = {side: _images_by_stem(base / side) for side in ("w", "l")}
    for side, other in (("w", "l"), ("l", "w")):
        alone = [path for stem, path in sides[side].items() if stem not in sides[other]]
        if alone:
            raise UserError(
                f"{alone[0]} has no counterpart of that name in {base / other} "
                f"({len(alone)} of {len(sides[side])} have none)"
            )
    if not sides["w"]:
        raise UserError(f"{base / 'w'} holds no images")
    log.info("folders: %s is preferred to %s by equal names", base / "w", base / "l")
    records = [
        {
            "caption": _caption_of(base, stem),
            "image_0": str(won.relative_to(base)),
            "image_1": str(sides["l"][stem].relative_to(base)),
            LABEL: 1.0,
        }
        for stem, won in sides["w"].items()
    ]
    about = json.dumps([_VERSION, str(base.resolve()), records])
    digest = hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()
    return kept_table(lambda: to_table(records), digest, cache_dir)


def _images_by_stem(folder: Path) -> dict[str, Path]:
    from PIL import Image

    known = Image.registered_extensions()
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix.lower() in known:
            twin = found.setdefault(str(path.relative_to(folder).with_suffix("")), path)
            if twin is not path:
                raise UserError(f"{twin} and {path} have one name: remove one of them")
    return found


def _caption_of(base: Path, stem: str) -> str:
    texts: dict[str, Path] = {}
    for side in ("w", "l"):
        for suffix in (".txt", ".caption"):
            path = base / side / f"{stem}{suffix}"
            if path.is_file():
                try:
                    text = path.read_text(encoding="utf-8-sig")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path} is not UTF-8: {error.reason}") from None
                texts.setdefault(" ".join(text.split("\n")).strip(), path)
    if not texts:
        raise UserError(f"{base / 'w' / stem} has no caption: add {stem}.txt beside the image")
    if len(texts) > 1:
        first, second = list(texts.values())[:2]
        raise UserError(f"{first} and {second} are captions of one pair and differ")
    return next(iter(texts))


def content_digest(path: Path) -> str:
    """Hash a file: its size and all of its content, of a large one its ends and 64 samples."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _DIGESTED_WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE_SIZE) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_SIZE))
        file.seek(-(1 << 16), os.SEEK_END)  # the footer
        digest.update(file.read())
    return digest.hexdigest()

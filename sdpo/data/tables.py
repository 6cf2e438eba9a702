"""Read local tables of pairs so that every value is what the file says.

JSON lines, JSON lists and CSV are read here and not by `datasets`, whose readers guess a column's
type from its first rows and take captions such as "None" for missing. Here all values are text,
but for label_0. Of parquet files the schemas are compared before they are read.
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
import pyarrow.parquet as pq

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


def open_text(files: Sequence[str], base: Path, cache_dir: str | None) -> Any:
    """Open JSON lines, JSON lists or CSV as a `datasets.Dataset`, kept as an Arrow file in the
    cache of `datasets`, by the content of the files.

    Raises:
        UserError: a file that cannot be read; names it and the line.
    """
    contents = [Path(file).read_bytes() for file in files]
    about = [_VERSION, str(base.resolve()), *files]
    digest = hashlib.sha256("\n".join(about).encode("utf-8", "surrogateescape"))
    for content in contents:
        digest.update(hashlib.sha256(content).digest())

    def table() -> pa.Table:
        records: list[Record] = []
        for file, content in zip(files, contents, strict=True):
            records += _records(Path(file), content)
        if not records:
            raise UserError(f"{files[0]} holds no rows")
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


def _records(path: Path, content: bytes) -> Iterator[Record]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file "
            "in UTF-8"
        ) from None
    if path.suffix.lower() == ".csv":
        return _records_of_csv(path, text)
    if text.lstrip().startswith("["):
        return _records_of_list(path, text)
    return _records_of_lines(path, text)


def parse_json(text: str) -> Any:
    """Parse JSON, its numbers as text: whether they are captions or labels their column tells."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _records_of_lines(path: Path, text: str) -> Iterator[Record]:
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


def _records_of_list(path: Path, text: str) -> Iterator[Record]:
    try:
        records = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {number}: a row must be an object of columns")
        yield number, record


def _records_of_csv(path: Path, text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
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
            columns[name] = pa.array([as_text(value) for value in values], pa.string())
    return pa.table(columns)


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


def open_parquet(files: Sequence[str], cache_dir: str | None, streaming: bool) -> Any:
    """Open parquet files as a dataset of the columns that all of them have.

    What `datasets` has made of them before is taken again only where their content is the same.

    Raises:
        ValueError: a file that is none.
    """
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

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


def _common_features(files: Sequence[str]) -> Any:
    """Give the columns that all files have, in types that hold what each file has; None where all
    files have the same.

    Raises:
        ValueError: a file is not parquet.
    """
    from datasets import Features

    found = []
    for file in files:
        try:
            found.append(Features.from_arrow_schema(pq.read_schema(file)))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: {first_line(error)}") from None
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

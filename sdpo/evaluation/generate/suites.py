"""Suites of prompts: the four known by name, and any user's JSON, JSONL, CSV, TSV or TXT file.

Prompts are taken as they stand, outer white space included: two texts that differ in a blank are
different inputs of a text encoder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import IN_CHECKOUT, PROMPTS_DIR

# Made by prompts/build.py from public sources; tinyworld is in the repository.
BUILT_SUITES = ("papv2", "hpsv2", "partiprompts")
KNOWN_SUITES = (*BUILT_SUITES, "tinyworld")
_PROMPT_KEYS = ("prompt", "Prompt", "caption", "Caption")
_CATEGORY_KEYS = ("category", "Category")


@dataclass(frozen=True)
class Prompt:
    """Holds one prompt, and its category in the suite where that has categories."""

    text: str
    category: str | None = None


@dataclass(frozen=True)
class Suite:
    """Holds prompts in the order in which they count; `name` is fit for file names."""

    name: str
    prompts: list[Prompt]


def digest(prompts: Iterable[str]) -> str:
    """Compute the sha256, in hex, of prompts in order, joined by newlines, as UTF-8."""
    return hashlib.sha256("\n".join(prompts).encode("utf-8")).hexdigest()


def read_suite(name_or_path: str) -> Suite:
    """Read a known suite by its name, else the one in a file.

    JSON: a list of strings, or of objects with `prompt` and perhaps `category` (manifests and the
    published lists are such). JSONL: one of these a line. CSV, TSV: a column `prompt` or `caption`,
    perhaps `category`. TXT: a prompt a line. Blank lines are passed over.

    Raises:
        UserError: no such suite or file, it is empty or not in its format, or a prompt is missing,
            blank or not text; names the file and the row (from 0) or line (from 1).
    """
    path = PROMPTS_DIR / f"{name_or_path}.json"
    if name_or_path not in KNOWN_SUITES:
        path = Path(name_or_path)
    elif name_or_path == "tinyworld" and not IN_CHECKOUT:
        path = Path(__file__).with_name("tinyworld.json")
    elif name_or_path in BUILT_SUITES and not path.is_file():
        raise UserError(
            f"the suite {name_or_path} is not built yet: run `python prompts/build.py "
            f"{name_or_path}`, on a machine without network with --source DIR"
        )
    return read_suite_file(path)


def read_suite_file(path: Path) -> Suite:
    """Read the suite in a file; it is named after the file.

    Raises:
        UserError: see `read_suite`.
    """
    read = _READERS.get(path.suffix.lower())
    if not path.is_file():
        known = "" if read else f"; known suites are {', '.join(KNOWN_SUITES)}"
        raise UserError(f"there is no file of prompts {path}{known}")
    if read is None:
        raise UserError(f"{path}: a file of prompts must be one of {', '.join(_READERS)}")
    try:
        # Decoded from bytes: text mode would turn a prompt's \r into \n.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the prompts in {path}: {error.strerror}") from None
    prompts = list(read(path, text))
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return Suite(re.sub(r"[^\w.-]+", "_", path.stem), prompts)


def _json(path: Path, text: str) -> Iterator[Prompt]:
    rows = _parse(f"{path}", text)
    if not isinstance(rows, list):
        raise UserError(f"{path} must be a JSON list of prompts, found {_type(rows)}")
    for number, row in enumerate(rows):
        yield _prompt(f"{path}, row {number}", row)


def _jsonl(path: Path, text: str) -> Iterator[Prompt]:
    for where, line in _lines(path, text):
        yield _prompt(where, _parse(where, line))


def _txt(path: Path, text: str) -> Iterator[Prompt]:
    for where, line in _lines(path, text):
        yield _prompt(where, line)


def _table(path: Path, text: str, delimiter: str) -> Iterator[Prompt]:
    # Strict: otherwise stray quotes silently vanish from prompts or swallow the rows after them.
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    last = 0
    try:
        columns = rows.fieldnames or []
        last = rows.reader.line_num
        if not set(columns) & set(_PROMPT_KEYS):
            raise UserError(
                f"{path}: no column {' or '.join(_PROMPT_KEYS)}; its first line must name the "
                f"columns, found {', '.join(columns) or 'nothing'}"
            )
        for row in rows:
            # The reader's own count: that of DictReader does not know blank lines.
            last = rows.reader.line_num
            where = f"{path}, line {last}"
            if None in row:
                raise UserError(
                    f"{where}: more fields than columns ({len(columns)}); a prompt with a "
                    "delimiter in it must stand in quotes"
                )
            yield _prompt(where, row)
    except csv.Error as error:
        raise UserError(
            f"{path}, the row from line {last + 1} on: {error}; a field that begins with a quote "
            "must end with one, and quotes inside it are doubled"
        ) from None


_READERS: dict[str, Callable[[Path, str], Iterator[Prompt]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".txt": _txt,
}


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(): that also splits at characters that a prompt may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.removesuffix("\r")


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _prompt(where: str, row: Any) -> Prompt:
    category = None
    if isinstance(row, dict):
        category = _category(where, row)
        key = next((key for key in _PROMPT_KEYS if key in row), None)
        if key is None:
            raise UserError(f"{where}: the key prompt is missing")
        row = row[key]
    if not isinstance(row, str):
        raise UserError(f"{where}: the prompt must be text, found {_type(row)}")
    if not row.strip():
        raise UserError(f"{where}: the prompt is blank")
    try:
        row.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: the prompt holds half a surrogate pair, not text") from None
    return Prompt(row, category)


def _category(where: str, row: dict[str, Any]) -> str | None:
    """A row's own, else the one that a manifest keeps in its metadata."""
    metadata = row.get("metadata")
    for holder in (row, metadata if isinstance(metadata, dict) else {}):
        for key in _CATEGORY_KEYS:
            value = holder.get(key)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where}: the category must be text, found {_type(value)}")
            if value:
                return value
    return None


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), f"{json.dumps(value)}")

"""Where the published suites can be had: the hub, a URL, or files in a directory.

Every place is a `Candidate`; build.py reads them in turn until one gives the published prompts.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from urllib.request import urlopen

from sdpo.common.errors import UserError, first_line
from sdpo.common.hub import look_for_hub
from sdpo.config.data import MIRRORS
from sdpo.evaluation.generate.suites import Prompt, read_suite_file

_PICKAPIC = "yuvalkirstain/pickapic_v2"
PAPV2_REPOS = ("yuvalkirstain/pickapic_v2_no_images", _PICKAPIC, *MIRRORS[_PICKAPIC])
PAPV2_FILES = "test*.parquet"
PAPV2_ORDER = Path(__file__).resolve().with_name("papv2.order")
HPSV2_REPOS = ("ymhao/HPDv2", "zhwang/HPDv2")
# The published order. The four files' sizes on the hub are those of the published list's quarters.
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPSV2_PER_STYLE = 800
PARTI_FILE = "PartiPrompts.tsv"
PARTI_URL = f"https://raw.githubusercontent.com/google-research/parti/main/{PARTI_FILE}"
# All three as lists of prompts, in the repository of the paper's code.
OFFICIAL_URL = "https://raw.githubusercontent.com/AIDC-AI/Diffusion-SDPO/HEAD/prompts/{}.json"
TIMEOUT = 60  # seconds without an answer

# What to download by hand, in words.
NEEDED = {
    "papv2": (
        f"data/{PAPV2_FILES} of the dataset {PAPV2_REPOS[0]}, or {OFFICIAL_URL.format('papv2')}"
    ),
    "hpsv2": f"benchmark/{{{','.join(HPSV2_STYLES)}}}.json of the dataset {HPSV2_REPOS[0]}",
    "partiprompts": PARTI_URL,
}


@dataclass(frozen=True)
class Candidate:
    """Names a place that may hold a suite. `read` raises whatever its file or network raises."""

    where: str
    read: Callable[[], list[Prompt]]


def on_the_network(name: str, cache_dir: str | None) -> list[Candidate]:
    """List the public sources of a suite, the preferred one first, the official repository last."""
    official = OFFICIAL_URL.format(name)
    return [*_sources(name, cache_dir), Candidate(official, partial(_official, name, official))]


def _sources(name: str, cache_dir: str | None) -> list[Candidate]:
    if name == "papv2":
        return [
            Candidate(f"data/{PAPV2_FILES} of {repo}", partial(_papv2_of_hub, repo))
            for repo in PAPV2_REPOS
        ]
    if name == "hpsv2":
        return [
            Candidate(f"benchmark/*.json of {repo}", partial(_hpsv2_of_hub, repo, cache_dir))
            for repo in HPSV2_REPOS
        ]
    return [Candidate(PARTI_URL, partial(_parti, partial(_download, PARTI_URL)))]


def on_disk(name: str, source: Path) -> list[Candidate]:
    """List what can make a suite among the files anywhere under `source`: its public source files,
    then lists NAME.json that somebody built or published."""
    found = []
    if name == "papv2":
        splits = sorted(source.rglob(PAPV2_FILES))
        if splits:
            found.append(Candidate(f"{source}/**/{PAPV2_FILES}", partial(_papv2_of_files, splits)))
    if name == "hpsv2":
        for first in sorted(source.rglob(f"{HPSV2_STYLES[0]}.json")):
            files = [first.with_name(f"{style}.json") for style in HPSV2_STYLES]
            if all(path.is_file() for path in files):
                found.append(Candidate(f"{first.parent}/*.json", partial(_hpsv2_of_files, files)))
    if name == "partiprompts":
        found += [
            Candidate(str(path), partial(_parti, path.read_bytes))
            for path in sorted(source.rglob(PARTI_FILE))
        ]
    lists = sorted(source.rglob(f"{name}.json"))
    return found + [Candidate(str(path), partial(_list_of_file, name, path)) for path in lists]


def pin(prompt: str) -> str:
    """Make a prompt's line of papv2.order: the first 16 hex digits of its sha256."""
    return hashlib.sha256(prompt.encode("utf-8")).hexdigest()[:16]


def in_papv2_order(captions: Iterable[str | None]) -> list[Prompt]:
    """Pick the captions that papv2.order pins, in its order; all others are left out.

    A caption may also be pinned without its outer white space.

    Raises:
        UserError: pinned ones are missing; says how many.
    """
    different = {caption for caption in captions if caption}
    texts = {pin(text): text for caption in different for text in (caption, caption.strip())}
    order = PAPV2_ORDER.read_text(encoding="ascii").split()
    missing = sum(key not in texts for key in order)
    if missing:
        raise UserError(
            f"{missing} of the {len(order)} published prompts are not among the {len(different)} "
            f"different captions, compared as a set (the other {len(order) - missing} are), so the "
            "split is not, or no longer, the one they were taken from"
        )
    return [Prompt(texts[key]) for key in order]


def read_captions(file: BinaryIO) -> list[str | None]:
    """Read the column `caption` of an open parquet file. Of the other columns nothing is read but
    what lies in the file's last 64 KiB, where its footer is looked for.

    Raises:
        UserError: there is no such column.
    """
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    if "caption" not in parquet.schema_arrow.names:
        raise UserError("it has no column caption")
    return parquet.read(columns=["caption"])["caption"].to_pylist()


def _papv2_of_hub(repo: str) -> list[Prompt]:
    from huggingface_hub import HfFileSystem

    look_for_hub()
    hub = HfFileSystem()
    paths = sorted(hub.glob(f"datasets/{repo}/data/{PAPV2_FILES}"))
    if not paths:
        raise FileNotFoundError("there are no such files")
    captions: set[str | None] = set()
    for path in paths:
        # Without reading ahead: what follows a column of captions is a column of images.
        with hub.open(path, "rb", cache_type="none") as file:
            captions.update(read_captions(file))
    return in_papv2_order(captions)


def _papv2_of_files(paths: list[Path]) -> list[Prompt]:
    captions: set[str | None] = set()
    skipped = ""
    for path in paths:
        try:
            with open(path, "rb") as file:
                captions.update(read_captions(file))
        # Somebody else's test*.parquet may lie in the same directory; OSError, ValueError and
        # arrow's own errors mean that it is not a readable one.
        except Exception as error:
            skipped = skipped or f"; {path} was passed over: {first_line(error)}"
    try:
        return in_papv2_order(captions)
    except UserError as error:
        raise UserError(f"{error}{skipped}") from None


def _hpsv2_of_hub(repo: str, cache_dir: str | None) -> list[Prompt]:
    from huggingface_hub import hf_hub_download

    look_for_hub()
    files = [
        hf_hub_download(repo, f"benchmark/{style}.json", repo_type="dataset", cache_dir=cache_dir)
        for style in HPSV2_STYLES
    ]
    return _hpsv2_of_files([Path(file) for file in files])


def _hpsv2_of_files(paths: list[Path]) -> list[Prompt]:
    return [
        Prompt(prompt.text, style)
        for style, path in zip(HPSV2_STYLES, paths, strict=True)
        for prompt in read_suite_file(path).prompts
    ]


def _download(url: str) -> bytes:
    # Held in memory and checked as a whole: nothing half-downloaded can be left behind.
    with urlopen(url, timeout=TIMEOUT) as answer:
        return bytes(answer.read())


def _official(name: str, url: str) -> list[Prompt]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_bytes(_download(url))
        return _list_of_file(name, path)


def _parti(read: Callable[[], bytes]) -> list[Prompt]:
    # Not strict, unlike suites.py: one prompt begins with a quoted word, and the published list has
    # it without these quotes, which is what the lenient reading gives.
    text = io.StringIO(read().decode("utf-8-sig"), newline="")
    rows = csv.DictReader(text, delimiter="\t")
    if not {"Prompt", "Category"} <= set(rows.fieldnames or []):
        raise UserError("it has no columns Prompt and Category")
    return [Prompt(row["Prompt"], row["Category"] or None) for row in rows]


def _list_of_file(name: str, path: Path) -> list[Prompt]:
    prompts = read_suite_file(path).prompts
    if name != "hpsv2":
        return prompts
    # Good only for the published order, which is checked before anything is written.
    last = len(HPSV2_STYLES) - 1
    return [
        replace(prompt, category=HPSV2_STYLES[min(i // HPSV2_PER_STYLE, last)])
        for i, prompt in enumerate(prompts)
    ]

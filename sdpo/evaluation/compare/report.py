"""`report.html`: the comparison as one page that needs nothing from anywhere else.

The page is `page/page.html` with its style and scripts; what it shows is embedded as JSON and
put into the page as text only, so that no prompt, label or category can be markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sdpo.common.errors import UserError
from sdpo.common.files import write_text
from sdpo.common.images import UndecodableImage, open_image
from sdpo.evaluation.compare.results import Comparison, Model, Study, result_fields
from sdpo.evaluation.compare.statistics import RESAMPLES

THUMBNAIL_SIDE = 512
_JPEG_QUALITY = 85
_PAGE = Path(__file__).resolve().parent / "page"
_SCRIPTS = ("tables.js", "charts.js", "pairs.js")


def write_report(path: Path, study: Study, *, inline_images: bool = False) -> None:
    """Write the page of a comparison of two or more models.

    Images are referred to by their path relative to the page, so that page and images can be moved
    together; with `inline_images` the page holds thumbnails of at most 512 px instead.

    Raises:
        UserError: an image to be inlined cannot be decoded.
    """
    models, metrics = study.models, study.metrics
    shown: list[set[int]] = [set() for _ in models]
    number = {model.label: i for i, model in enumerate(models)}
    for c in study.comparisons:
        shown[number[c.a.label]].update(c.alignment.rows_a)
        shown[number[c.b.label]].update(c.alignment.rows_b)
    data = {
        "metrics": [
            {"name": name, "label": models[0].title(name), "meaning": models[0].meaning(name)}
            for name in metrics
        ],
        "models": [
            {
                "label": model.label,
                "prompts": model.table.manifest.prompts,
                "images": _images(model, rows, path.parent, inline_images),
                "scores": {name: model.table.columns[name].tolist() for name in metrics},
            }
            for model, rows in zip(models, shown, strict=True)
        ],
        "comparisons": [_comparison(c, number) for c in study.comparisons],
        "matrices": [study.matrix(name) for name in metrics],
        "ties": study.comparisons[0].ties,
        "align": study.comparisons[0].by,
        "resamples": RESAMPLES,
        "notes": study.notes,
    }
    write_text(path, render(" vs ".join(number), data))


def render(title: str, data: dict[str, Any]) -> str:
    """Put the page together. Scripts and style are allowed by their hash, and nothing else: markup
    that got into the page all the same would neither run nor load anything."""
    script = "\n".join(_read(name) for name in _SCRIPTS)
    style = _read("style.css")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        # A prompt must not end the element that holds it.
        "DATA": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass, so that what was put in is not looked through for more.
    return re.sub(r"@@([A-Z_]+)@@", lambda m: parts[m[1]], _read("page.html"))


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _comparison(c: Comparison, number: dict[str, int]) -> dict[str, Any]:
    return {
        "a": number[c.a.label],
        "b": number[c.b.label],
        **asdict(c.alignment),
        "pair_categories": c.pair_categories,
        "results": {name: result_fields(r) for name, r in c.results.items()},
        "categories": {
            name: {k: result_fields(r) for k, r in results.items()}
            for name, results in c.categories.items()
        },
    }


def _images(model: Model, rows: set[int], directory: Path, inline: bool) -> list[str]:
    """A URL for each of the model's images, "" for those in no pair."""
    entries = model.table.manifest.entries
    if not inline:
        return [
            quote(Path(os.path.relpath(entry.image, directory)).as_posix()) if i in rows else ""
            for i, entry in enumerate(entries)
        ]
    from tqdm.auto import tqdm

    bar = tqdm(entries, desc=f"thumbnails {model.label}", unit="image", disable=None)
    return [_thumbnail(entry.image) if i in rows else "" for i, entry in enumerate(bar)]


def _thumbnail(path: Path) -> str:
    """Make a data URI of an image, at most 512 px a side; small ones stay as they are."""
    try:
        small = open_image(str(path))
    except UndecodableImage as error:
        raise UserError(f"--inline_images: cannot decode {path}: {error}") from None
    # JPEG would smear what a tiny image shows, and saves nothing there.
    kind = "png" if max(small.size) <= THUMBNAIL_SIDE // 4 else "jpeg"
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = io.BytesIO()
    small.save(data, kind, quality=_JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"

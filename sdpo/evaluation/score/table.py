"""Scores on disk, one row an image, beside the manifest: `<stem>_scores.parquet`, and the same as
`<stem>_scores.json` to read.

A score belongs to the bytes of an image, a prompt and a scorer's weights; what was written for
others is not returned.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdpo.common.errors import UserError
from sdpo.common.files import file_sha256, write_json, written_beside
from sdpo.evaluation.generate.manifest import Entry, Manifest

_METADATA_KEY = b"sdpo.scorers"
_ROW_COLUMNS = ("prompt", "gen_image_path", "image_sha256")


def parquet_path(manifest: Path) -> Path:
    """Name the file of a manifest's scores."""
    return manifest.with_name(f"{manifest.stem}_scores.parquet")


def json_path(manifest: Path) -> Path:
    """Name the file of a manifest's scores in JSON."""
    return manifest.with_name(f"{manifest.stem}_scores.json")


@dataclass
class ScoreTable:
    """Holds the scores of a manifest's n images.

    Attributes:
        digests: sha256 of every image.
        columns: of each scorer (n,) float64, NaN where not scored.
        about: of each scorer, what made its scores: label, weights and precision, and a meaning
            where the label does not say it.
        in_order: the files have these rows, in this order.
    """

    manifest: Manifest
    digests: list[str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    in_order: bool = False

    def missing(self, scorer: str) -> np.ndarray:
        """Number the rows without a score."""
        if scorer not in self.columns:
            return np.arange(len(self.manifest))
        return np.flatnonzero(np.isnan(self.columns[scorer]))

    def complete(self) -> list[str]:
        """Name the scorers that have scored every image."""
        return [name for name in self.columns if not len(self.missing(name))]

    def put(self, scorer: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Enter scores of some rows."""
        if scorer not in self.columns:
            self.columns[scorer] = np.full(len(self.manifest), math.nan)
        self.columns[scorer][rows] = values

    def add(self, entries: list[Entry]) -> None:
        """Append images, which no scorer has scored."""
        self.manifest = Manifest(self.manifest.path, [*self.manifest.entries, *entries])
        self.digests += [file_sha256(entry.image) for entry in entries]
        unknown = np.full(len(entries), math.nan)
        self.columns = {name: np.append(v, unknown) for name, v in self.columns.items()}

    def drop(self, scorer: str) -> None:
        """Forget a scorer's scores."""
        self.columns.pop(scorer, None)
        self.about.pop(scorer, None)

    def save(self) -> None:
        """Write both files whole."""
        manifest = self.manifest
        images = [os.path.relpath(e.image, manifest.path.parent) for e in manifest.entries]
        columns: dict[str, Any] = dict(
            zip(_ROW_COLUMNS, (manifest.prompts, images, self.digests), strict=True)
        )
        columns |= {name: pa.array(v, mask=np.isnan(v)) for name, v in self.columns.items()}
        table = pa.table(columns)
        table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(self.about)})
        path = parquet_path(manifest.path)
        with written_beside(path) as beside:
            pq.write_table(table, beside)
        write_json(json_path(manifest.path), {"scorers": self.about, "scores": table.to_pylist()})
        self.in_order = True


def read_scores(manifest: Manifest) -> ScoreTable:
    """Read what has been scored of a manifest, as far as it still holds.

    A row's scores are kept where the file has a row of the same prompt and the same image bytes.

    Raises:
        UserError: there is a score file and it cannot be read; an image cannot be read.
    """
    try:
        with ThreadPoolExecutor() as threads:  # hashing and reading leave Python to others
            digests = list(threads.map(file_sha256, [e.image for e in manifest.entries]))
    except OSError as error:
        raise UserError(f"{manifest.path}: cannot read an image: {error}") from None
    table = ScoreTable(manifest, digests)
    path = parquet_path(manifest.path)
    if not path.is_file():
        return table
    try:
        stored = pq.read_table(path)
        about = json.loads(stored.schema.metadata[_METADATA_KEY])
        keys = list(zip(*(stored[c].to_pylist() for c in _ROW_COLUMNS[::2]), strict=True))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a score file ({error}); delete it to score the images again"
        ) from None
    found = {key: number for number, key in enumerate(keys)}
    wanted = list(zip(manifest.prompts, digests, strict=True))
    table.in_order = keys == wanted
    rows = [found.get(key, -1) for key in wanted]
    here, there = np.array([(i, r) for i, r in enumerate(rows) if r >= 0] or [(0, 0)]).T
    if max(rows, default=-1) < 0:
        return table
    for name in about:
        values = stored[name].to_numpy(zero_copy_only=False).astype(np.float64)
        table.put(name, here, values[there])
        table.about[name] = about[name]
    return table

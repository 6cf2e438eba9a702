"""Manifests of tiny images with made-up scores, for what only reads scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sdpo.evaluation.generate.manifest import read_manifest, write_manifest
from sdpo.evaluation.score.table import read_scores


def make_model(
    folder: Path,
    prompts: list[str],
    scores: dict[str, list[float]],
    categories: list[str] | None = None,
    stem: str = "suite_seed0_8x8_7.5cfg",
    size: tuple[int, int] = (8, 8),
) -> Path:
    """A manifest with plain images and their scores; returns its path. NaN is not scored."""
    images = folder / stem
    images.mkdir(parents=True)
    rows = []
    for i, prompt in enumerate(prompts):
        shade = (17 * i % 256, len(folder.name), 90)
        Image.new("RGB", size, shade).save(images / f"{i}_8x8.png")
        metadata = {"category": categories[i]} if categories else {}
        rows.append((prompt, f"{stem}/{i}_8x8.png", metadata))
    path = folder / f"{stem}.json"
    write_manifest(path, rows)
    table = read_scores(read_manifest(path))
    for name, values in scores.items():
        table.put(name, np.arange(len(prompts)), np.array(values, dtype=float))
        about = {"label": name.title(), "weights": {"model": ["x"]}, "precision": "no"}
        table.about[name] = about
    if scores:
        table.save()
    return path

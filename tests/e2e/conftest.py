"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdpo.tinyworld.pairs import build_pairs

from .harness import FLAGS, Run, Trainer


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    """One `--cache_dir` for all runs, so that the pairs are converted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def shaped_pairs(tmp_path_factory):
    """32 pairs of the tiny world, stretched to three shapes."""
    table = build_pairs(32, 0, tie_share=0.0)
    sizes = [(96, 54), (54, 96), (64, 64)]
    for name in ("jpg_0", "jpg_1"):
        images = []
        for i, value in enumerate(table[name].to_pylist()):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(value)).resize(sizes[i % 3]).save(buffer, "PNG")
            images.append(buffer.getvalue())
        column = pa.array(images, pa.binary())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    directory = tmp_path_factory.mktemp("shaped")
    pq.write_table(table, directory / "train.parquet")
    return directory


@pytest.fixture(scope="session")
def train(tiny_sd15, tiny_sdxl, tiny_sd3, pairs_dir, datasets_cache, tmp_path_factory) -> Trainer:
    """Runs train.py on the tiny models and pairs."""
    scratch = tmp_path_factory.mktemp("stderr")
    models = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "sd3": tiny_sd3}
    return Trainer(models, pairs_dir, datasets_cache, scratch)


@pytest.fixture(scope="session")
def one(train, tmp_path_factory) -> Run:
    """What one process trains, which those that divide the work are held against."""
    return train(tmp_path_factory.mktemp("one"), **FLAGS, train_batch_size=4)

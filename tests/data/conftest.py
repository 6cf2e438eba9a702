"""Small data sets with images one can recognise."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


def encoded(value: int, size=(64, 64), fmt="PNG") -> bytes:
    """A plain grey image of one value."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, format=fmt)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_rows():
    """`make_rows(n)`: rows whose winner is grey 100 + row and whose loser is black + row; the
    winner is image 0 in even rows. Row numbers are thus to be read from the pixels."""

    def make(n, labels=None, bad=()):
        rows = []
        for i in range(n):
            label = float(i % 2 == 0) if labels is None else labels[i]
            won, lost = encoded(100 + i), encoded(i)
            if i in bad:
                won, lost = b"not an image", won
            rows.append(
                {
                    "jpg_0": won if label == 1 else lost,
                    "jpg_1": lost if label == 1 else won,
                    "label_0": label,
                    "caption": f"caption {i}",
                    "model_0": "dreamlike-art/x" if i % 3 else "other",
                    "model_1": "CompVis/y" if i % 4 == 1 else "dreamlike-art/z",
                    "extra": i,
                }
            )
        return rows

    return make


@pytest.fixture
def make_parquet(tmp_path_factory):
    """`make_parquet(rows, shards=1, split="train")`: the directory of a parquet data set."""

    def make(rows, shards=1, split="train", directory=None):
        import pyarrow as pa
        import pyarrow.parquet as pq

        directory = directory or tmp_path_factory.mktemp("parquet")
        for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
            table = pa.Table.from_pylist([rows[i] for i in part])
            pq.write_table(table, directory / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
        return directory

    return make


def row_of(pixels) -> int:
    """The row that a winner's or a loser's pixels came from."""
    value = round(float((pixels.mean() + 1) * 127.5))
    return value - 100 if value >= 100 else value


@pytest.fixture(scope="session")
def rows_of():
    """`rows_of(batch)`: per pair the row of winner and loser, as read from the pixels."""

    def rows(batch):
        winners, losers = batch.pixels.chunk(2)
        return [(row_of(w), row_of(lost)) for w, lost in zip(winners, losers, strict=True)]

    return rows

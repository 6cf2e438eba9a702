"""--stream_shards own: each process its own files, nothing read twice, resumable."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.loader import PairLoader
from sdpo.data.order import FIRST
from sdpo.data.source import open_pairs


@pytest.fixture
def loader(make_config):
    """`loader(directory, rank, world, start=FIRST, **flags)`."""

    def make(directory, rank=0, world=1, start=FIRST, **flags):
        flags = {"resolution": 16, "max_bad_fraction": 0.5, "stream_shards": "own", **flags}
        config = make_config(train_data_dir=directory, streaming=True, **flags)
        return PairLoader(open_pairs(config.data, config.run.seed), config, rank, world, start)

    return make


def rows(batches, rows_of):
    return [row for batch in batches for row, loser in rows_of(batch) if row == loser]


def test_every_process_reads_its_own_files(loader, make_rows, make_parquet, rows_of):
    """Files of 8, 8 and 8 rows and two processes: the first has files 0 and 2."""
    directory = make_parquet(make_rows(24), shards=3)
    first = rows(islice(iter(loader(directory, 0, 2)), 16), rows_of)
    second = rows(islice(iter(loader(directory, 1, 2)), 8), rows_of)
    assert sorted(first[:16]) == sorted(first[16:]) == [*range(8), *range(16, 24)]
    assert sorted(second[:8]) == sorted(second[8:]) == list(range(8, 16))
    assert first[:16] != first[16:]
    assert second[:8] != second[8:]


def test_only_its_own_files_are_opened(loader, make_rows, make_parquet, monkeypatch):
    directory = make_parquet(make_rows(24), shards=3)
    own = loader(directory, 1, 2)
    opened = []
    shard = type(own._loader.dataset.source.rows).shard

    def watched(self, num_shards, index):
        opened.append(index)
        return shard(self, num_shards, index)

    monkeypatch.setattr(type(own._loader.dataset.source.rows), "shard", watched)
    list(islice(iter(own), 9))
    assert set(opened) == {1}


def test_keys_are_different_over_processes(loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(24), shards=3)
    keys = [
        key
        for rank in range(2)
        for batch in islice(iter(loader(directory, rank, 2)), 6)
        for key in batch.keys
    ]
    assert sorted(keys) == [(0, 0, i) for i in range(24)]


def test_resuming_goes_on_where_it_was(loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(24, bad={3, 10}), shards=3)
    for rank in range(2):
        own = loader(directory, rank, 2)
        batches = list(islice(iter(own), 14))
        place = own.place_after(batches[8])
        assert place == (0, 36)
        again = list(islice(iter(loader(directory, rank, 2, place)), 5))
        for expected, found in zip(batches[9:], again, strict=True):
            assert torch.equal(expected.pixels, found.pixels)
            assert expected.keys == found.keys


def test_alone_it_reads_all(loader, make_rows, make_parquet, rows_of):
    directory = make_parquet(make_rows(12), shards=2)
    assert sorted(rows(islice(iter(loader(directory)), 6), rows_of)) == list(range(12))


def test_refusals(loader, make_config, make_rows, make_parquet):
    directory = make_parquet(make_rows(4), shards=2)
    with pytest.raises(UserError, match="2 files cannot be shared out to 3 processes"):
        loader(directory, 0, 3)
    ties = make_parquet(make_rows(4, labels=[0.5, 0.5, 1.0, 0.0]), shards=2)
    with pytest.raises(UserError, match="no usable pair in the files of process 0"):
        next(iter(loader(ties, 0, 2)))
    with pytest.raises(UserError, match="without --streaming"):
        make_config(stream_shards="own")
    with pytest.raises(UserError, match="--max_train_samples"):
        make_config(stream_shards="own", streaming=True, max_train_samples=3)

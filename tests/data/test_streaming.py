"""--streaming: the same pairs whatever the ranks, without downloading ahead."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.loader import PairLoader
from sdpo.data.source import open_pairs


@pytest.fixture
def stream(make_config):
    """`stream(directory, count, rank=0, world=1, **flags)`: the first batches of a stream."""

    def batches(directory, count, rank=0, world=1, **flags):
        flags = {"resolution": 16, "max_bad_fraction": 0.5, **flags}
        config = make_config(train_data_dir=directory, streaming=True, **flags)
        loader = PairLoader(open_pairs(config.data, config.run.seed), config, rank, world)
        found = list(islice(iter(loader), count))
        found_rows.append(loader.counter.rows)
        return found

    found_rows = []
    batches.bad_rows = found_rows
    return batches


def test_an_epoch_holds_every_decided_pair_once(stream, make_rows, make_parquet, rows_of):
    labels = [0.5 if i % 4 == 0 else None if i % 4 == 1 else float(i % 2) for i in range(24)]
    directory = make_parquet(make_rows(24, labels=labels), shards=3)
    batches = stream(directory, 12)
    rows = [row for batch in batches for row, loser in rows_of(batch) if row == loser]
    wanted = [i for i in range(24) if i % 4 > 1]
    assert sorted(rows[:12]) == sorted(rows[12:]) == wanted
    assert rows[:12] != rows[12:], "epochs should be shuffled each in its own way"
    assert rows[:12] != wanted
    assert [b.place.epoch for b in batches] == [0] * 6 + [1] * 6


@pytest.mark.parametrize("bad", [(), (3,), (0, 1, 2, 9)])
@pytest.mark.parametrize("size", [12, 15])
def test_ranks_share_out_a_step(stream, make_rows, make_parquet, bad, size):
    directory = make_parquet(make_rows(size, bad=bad), shards=2)
    alone = stream(directory, 7, train_batch_size=4)
    ranks = [stream(directory, 7, rank, 2) for rank in range(2)]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        halves = [part.pixels.chunk(2) for part in parts]
        pixels = torch.cat([w for w, _ in halves] + [lost for _, lost in halves])
        assert torch.equal(pixels, batch.pixels)
        assert parts[0].keys + parts[1].keys == batch.keys
        assert parts[0].captions + parts[1].captions == batch.captions


def test_a_worker_reads_the_same_stream(stream, make_rows, make_parquet):
    directory = make_parquet(make_rows(10, bad={4}), shards=2)
    here = stream(directory, 6)
    there = stream(directory, 6, dataloader_num_workers=1)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(here, there, strict=True))
    assert [b.bad_rows for b in here] == [b.bad_rows for b in there]


def test_bad_rows_are_replaced_and_named(stream, make_rows, make_parquet, rows_of):
    labels = [0.5, *[float(i % 2) for i in range(1, 10)]]
    directory = make_parquet(make_rows(10, labels=labels, bad={3, 7}))
    batches = stream(directory, 12)
    rows = {row for batch in batches for pair in rows_of(batch) for row in pair}
    assert rows == {1, 2, 4, 5, 6, 8, 9}
    assert stream.bad_rows[-1] == {3, 7}


def test_the_last_row_of_an_epoch_may_be_bad(stream, make_rows, make_parquet, rows_of):
    # Over the epochs each row, so the bad one too, comes last; nothing follows it there.
    # So it is with a whole step of them.
    for bad in ({2}, {1, 2}):
        directory = make_parquet(make_rows(4, bad=bad))
        batches = stream(directory, 40)
        rows = {row for batch in batches for pair in rows_of(batch) for row in pair}
        assert rows == {0, 1, 2, 3} - bad


def test_a_bad_row_keeps_its_number_in_every_epoch(stream, make_rows, make_parquet):
    for shards, names in ((1, {5, 17}), (3, {"5 of shard 0", "1 of shard 2"})):
        directory = make_parquet(make_rows(24, bad={5, 17}), shards=shards)
        batches = stream(directory, 60, train_batch_size=4)
        assert batches[-1].place.epoch >= 9
        assert stream.bad_rows[-1] == names


def test_more_rows_than_are_held(stream, make_rows, make_parquet, rows_of, monkeypatch):
    monkeypatch.setattr("sdpo.data.stream.SHUFFLE_BUFFER", 5)
    directory = make_parquet(make_rows(24), shards=2)
    rows = [row for batch in stream(directory, 12) for row, _ in rows_of(batch)]
    assert sorted(rows) == list(range(24))
    # A row cannot come before it is read: its place less its number in the file is at most 5 early.
    starts = 0 if rows[0] < 12 else 12
    assert all((row - starts) % 24 <= place + 5 for place, row in enumerate(rows))
    assert rows != sorted(rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_less_data_than_a_step_is_refused(stream, make_rows, make_parquet, workers):
    directory = make_parquet(make_rows(3))
    with pytest.raises(UserError) as caught:
        stream(directory, 1, world=2, dataloader_num_workers=workers)
    assert str(caught.value).startswith("--streaming: an epoch has fewer usable pairs than one")
    assert "(4)" in str(caught.value)


def test_invalid_label_names_its_row(stream, make_rows, make_parquet):
    directory = make_parquet(make_rows(4, labels=[1.0, 0.0, 3.0, 1.0]))
    with pytest.raises(UserError, match=r"row 2: label_0 is 3\.0"):
        stream(directory, 4)


def test_max_train_samples(stream, make_rows, make_parquet, rows_of):
    directory = make_parquet(make_rows(30), shards=2)
    batches = stream(directory, 6, max_train_samples=6)
    rows = [row for batch in batches for row, _ in rows_of(batch)]
    assert len(set(rows[:6])) == 6
    assert [b.place.epoch for b in batches] == [0, 0, 0, 1, 1, 1]
    assert set(rows[:6]) == set(rows[6:]), "--max_train_samples must keep the same pairs"


def test_dreamlike_pairs_only(stream, make_rows, make_parquet, rows_of):
    directory = make_parquet(make_rows(24))
    wanted = {i for i in range(24) if i % 3 and i % 4 != 1}
    batches = stream(directory, len(wanted) // 2, dreamlike_pairs_only=True)
    assert {row for batch in batches for row, _ in rows_of(batch)} == wanted


def test_images_stored_with_a_feature(stream, make_rows, rows_of, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(make_rows(4))
    rows = rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    rows.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    batches = stream(tmp_path, 2)
    assert sorted(rows_of(batches[0]) + rows_of(batches[1])) == [(i, i) for i in range(4)]

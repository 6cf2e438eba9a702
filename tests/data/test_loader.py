"""Batches as training gets them: bad rows, workers, ranks and resuming."""

from __future__ import annotations

import logging
from itertools import islice

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.loader import BadRowCounter, PairLoader
from sdpo.data.order import FIRST
from sdpo.data.pairs import BadRow
from sdpo.data.source import open_pairs


@pytest.fixture
def make_loader(make_config):
    """`make_loader(directory, rank=0, world=1, start=FIRST, **flags)`."""

    def make(directory, rank=0, world=1, start=FIRST, **flags):
        flags = {"resolution": 16, "max_bad_fraction": 0.5, **flags}
        config = make_config(train_data_dir=directory, **flags)
        return PairLoader(open_pairs(config.data, config.run.seed), config, rank, world, start)

    return make


def take(loader, count):
    return list(islice(iter(loader), count))


def same(batch, other):
    return (
        torch.equal(batch.pixels, other.pixels)
        and batch.captions == other.captions
        and batch.keys == other.keys
        and batch.bad_rows == other.bad_rows
    )


def joined(batches):
    """Batches of all ranks of one step, as one process would have them."""
    halves = [batch.pixels.chunk(2) for batch in batches]
    pixels = torch.cat([w for w, _ in halves] + [lost for _, lost in halves])
    return (
        pixels,
        [caption for b in batches for caption in b.captions],
        [key for b in batches for key in b.keys],
    )


def test_counter_counts_a_row_once_and_says_it_once(caplog):
    counter = BadRowCounter(0.01)
    for _ in range(3):
        counter.update(10, [BadRow(7, "broken"), BadRow(7, "broken")])
    assert counter.rows == {7}
    assert counter.seen == 30
    assert caplog.text.count("row 7 skipped") == 1
    assert "broken" in caplog.text


def test_counter_stops_beyond_the_share():
    counter = BadRowCounter(0.01)
    counter.update(1, [BadRow(0, ""), BadRow(1, "")])  # 2 of the first 200 are allowed
    with pytest.raises(UserError, match=r"3 of 2 .* \(rows 0, 1, 9.*--max_bad_fraction 0\.01"):
        counter.update(1, [BadRow(9, "")])
    counter = BadRowCounter(0.01)
    counter.update(1000, [BadRow(i, "") for i in range(10)])
    with pytest.raises(UserError, match="11 of 1001"):
        counter.update(1, [BadRow(10, "")])
    with pytest.raises(UserError, match="1 of 1 "):
        BadRowCounter(0.0).update(1, [BadRow(0, "")])


def test_bad_rows_are_named_by_their_number_before_ties_were_dropped(
    make_loader, make_rows, make_parquet, rows_of, caplog
):
    labels = [0.5, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 0.0]
    loader = make_loader(make_parquet(make_rows(8, labels=labels, bad={4}), shards=2))
    with caplog.at_level(logging.WARNING, "sdpo"):
        batches = take(loader, 9)
    assert loader.counter.rows == {4}
    assert caplog.text.count("skipped") == 1
    assert "row 4 skipped" in caplog.text
    seen = {row for batch in batches for pair in rows_of(batch) for row in pair}
    assert seen == {1, 3, 5, 6, 7}


def test_too_many_bad_rows_stop_the_run(make_loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(8, bad={1, 2, 3}))
    with pytest.raises(UserError, match=r"3 of \d+ pairs .*1, 2, 3.*--max_bad_fraction"):
        take(make_loader(directory, max_bad_fraction=0.01), 20)
    with pytest.raises(UserError, match=r"[12] of [246] pairs"):
        take(make_loader(directory, max_bad_fraction=0.0), 20)
    assert len(take(make_loader(directory, max_bad_fraction=0.1), 20)) == 20


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_when_no_image_can_be_decoded(make_loader, make_rows, make_parquet, streaming, workers):
    directory = make_parquet(make_rows(60, bad=set(range(60))))
    loader = make_loader(
        directory, streaming=streaming, dataloader_num_workers=workers, max_bad_fraction=1.0
    )
    with pytest.raises(UserError) as caught:
        take(loader, 1)
    # One sentence, from a worker as well, without the worker's traceback.
    assert " rows cannot be decoded, the first of them row " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_number_of_workers_changes_nothing(make_loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(11, bad={5}), shards=2)
    flags = {"random_crop": True, "proportion_empty_prompts": 0.5}
    by_workers = [
        take(make_loader(directory, dataloader_num_workers=n, **flags), 8) for n in (0, 1, 2)
    ]
    for batches in by_workers[1:]:
        assert all(same(a, b) for a, b in zip(batches, by_workers[0], strict=True))
    assert len({batch.keys[0] for batch in by_workers[0]}) == 8


def test_ranks_share_out_a_step(make_loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(11, bad={5}))
    alone = take(make_loader(directory, train_batch_size=4), 5)
    ranks = [take(make_loader(directory, rank=r, world=2), 5) for r in range(2)]
    for step, batch in enumerate(alone):
        pixels, captions, keys = joined([rank[step] for rank in ranks])
        assert torch.equal(pixels, batch.pixels)
        assert (captions, keys) == (batch.captions, batch.keys)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_goes_on_identically(make_loader, make_rows, make_parquet, rank, streaming):
    directory = make_parquet(make_rows(13, bad={5}), shards=2)
    loader = make_loader(directory, rank, 2, streaming=streaming)
    whole = take(loader, 9)  # three steps of four pairs an epoch
    assert whole[-1].place.epoch == 2
    for done in (1, 3, 4, 6, 8):
        start = loader.place_after(whole[done - 1])
        rest = take(make_loader(directory, rank, 2, start, streaming=streaming), 9 - done)
        assert [b.keys for b in rest] == [b.keys for b in whole[done:]]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(rest, whole[done:], strict=True))
        assert [b.captions for b in rest] == [b.captions for b in whole[done:]]


def test_place_after_is_the_same_on_every_rank(make_loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(12))
    loaders = [make_loader(directory, rank, 3) for rank in range(3)]
    places = [[x.place_after(b) for b in take(x, 4)] for x in loaders]
    assert places[0] == places[1] == places[2]
    assert places[0][:2] == [(0, 6), (0, 12)]


def test_steps_of_epochs(make_loader, make_rows, make_parquet):
    directory = make_parquet(make_rows(11))
    for epochs, accumulation, steps in ((1, 1, 2), (3, 1, 6), (3, 4, 2), (2, 4, 1), (1, 2, 1)):
        flags = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulation}
        loader = make_loader(directory, world=2, **flags)
        assert loader.stride == 4
        assert loader.max_train_steps == steps


def test_other_errors_inside_a_worker_keep_their_sentence(make_loader, make_rows, make_parquet):
    rows = [{**row, "label_0": 3.0} for row in make_rows(4)]
    for workers in (0, 1):
        loader = make_loader(make_parquet(rows), streaming=True, dataloader_num_workers=workers)
        with pytest.raises(UserError) as caught:
            take(loader, 1)
        assert str(caught.value).startswith("row 0: label_0 is 3.0; it must be")
        assert "\n" not in str(caught.value)


def shares(make_loader, directory, **flags):
    """The share for each row's winner, {row: share}, as an epoch's batches have it."""
    loader = make_loader(directory, train_batch_size=1, **flags)
    found = {}
    for batch in take(loader, 9):
        assert batch.preference.shape == (1,)
        found[batch.captions[0]] = batch.preference.item()
    return found


@pytest.mark.parametrize("streaming", [False, True])
def test_the_winner_s_share_comes_with_the_batch(
    make_loader, make_rows, make_parquet, rows_of, streaming
):
    flags = {"proportion_empty_prompts": 0, "streaming": streaming}
    labels = [0.75, 0.25, 1.0, 0.5, 0.0]
    # Rows 0 and 2 have their winner, the lighter image, as image 0.
    rows = make_rows(5, labels=[float(label > 0.5) for label in labels])
    rows = [{**row, "label_0": label} for row, label in zip(rows, labels, strict=True)]
    directory = make_parquet(rows)
    wanted = {"caption 0": 0.75, "caption 1": 0.75, "caption 2": 1.0, "caption 4": 1.0}
    assert shares(make_loader, directory, **flags) == wanted
    for batch in take(make_loader(directory, **flags), 2):
        assert batch.pixels[:2].mean() > batch.pixels[2:].mean()

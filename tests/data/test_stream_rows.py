"""A stream that goes on in the middle of an epoch: in the same order, and without the files that it
is through with."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.common.randomness import generator
from sdpo.data.loader import PairLoader
from sdpo.data.order import FIRST
from sdpo.data.source import PairSource, open_pairs
from sdpo.data.stream import OwnShards, StreamingPairs
from sdpo.data.stream_rows import ROWS_DIR

HELD = 5
# Labels of the rows of eight shards; the third and the last have no decided pair.
SHARDS = [
    *([1.0] * 9, [0.5, 0.0, 1.0, 0.5], [0.5], [0.0] * 12, [1.0, 0.5] * 4, [0.0]),
    *([None, 1.0, 0.0], [None, 0.5]),
]
LENGTHS = [sum(label in (0, 1) for label in labels) for labels in SHARDS]
KNOWN = {
    "none": {},
    "all": dict(enumerate(LENGTHS)),
    "some": {i: LENGTHS[i] for i in (0, 2, 3, 4)},
    "others": {i: LENGTHS[i] for i in (1, 5, 6, 7)},
}


class Rows:
    """Stands for an `IterableDataset`; notes which shards are read."""

    num_shards = len(SHARDS)

    def __init__(self):
        self.read = []

    def shard(self, num_shards, index):
        assert num_shards == len(SHARDS)
        for label in SHARDS[index]:
            if not self.read or self.read[-1] != index:
                self.read.append(index)
            yield {"label_0": label}


@pytest.fixture
def stream(make_config, monkeypatch):
    """`stream(known, kind=StreamingPairs, rank=0, world=1, **flags)`: and `.rows`, its `Rows`."""
    monkeypatch.setattr("sdpo.data.stream.SHUFFLE_BUFFER", HELD)
    own = make_config(streaming=True, stream_shards="own")
    plain = make_config(streaming=True)
    limited = make_config(streaming=True, max_train_samples=17)

    def make(known, kind=StreamingPairs, rank=0, world=1, limit=False):
        config = limited if limit else own if kind is OwnShards else plain
        source = PairSource(Rows(), None, None)
        found = kind(source, None, config, rank, world)
        found.counts.known = dict(known)
        return found

    return make


def order_of(shards, seed, epoch):
    """The numbers of an epoch's pairs as the docs have them: files shuffled, then a window."""
    drawn = generator(seed, epoch, "stream-order")
    pairs = [
        f"{row} of shard {shards[i]}"
        for i in torch.randperm(len(shards), generator=drawn).tolist()
        for row, label in enumerate(SHARDS[shards[i]])
        if label in (0, 1)
    ]
    held, found = pairs[:HELD], []
    for pair in pairs[HELD:]:
        slot = int(torch.randint(HELD, (), generator=drawn))
        found.append(held[slot])
        held[slot] = pair
    return found + [held[i] for i in torch.randperm(len(held), generator=drawn).tolist()]


def numbers(pairs):
    return [number for number, _ in pairs]


def test_draws_at_once_are_those_one_by_one():
    at_once, one_by_one = generator(3, "draws"), generator(3, "draws")
    drawn = torch.randint(1000, (20_000,), generator=at_once).tolist()
    assert drawn == [int(torch.randint(1000, (), generator=one_by_one)) for _ in range(20_000)]
    assert torch.equal(
        torch.randperm(9, generator=at_once), torch.randperm(9, generator=one_by_one)
    )


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_goes_on_at_every_position(stream, known, epoch):
    expected = order_of(range(8), 0, epoch)
    assert len(expected) == sum(LENGTHS) == 30
    for position in range(len(expected) + 3):
        found = stream(KNOWN[known])._pairs_of(epoch, position)
        assert numbers(found) == expected[position:], position


@pytest.mark.parametrize("known", KNOWN)
def test_own_files_go_on_at_every_position(stream, known):
    for rank in range(2):
        shards = range(8)[rank::2]
        turns = [number for turn in range(5) for number in order_of(shards, 0, turn)]
        for position in range(len(turns) - 9):
            found = stream(KNOWN[known], OwnShards, rank, 2)._pairs_of(0, position)
            assert numbers(islice(found, 9)) == turns[position : position + 9], position


@pytest.mark.parametrize("known", KNOWN)
def test_max_train_samples_go_on(stream, known):
    expected = order_of(range(8), 0, 0)[:17]
    for position in range(20):
        found = stream(KNOWN[known], limit=True)._pairs_of(4, position)
        assert numbers(found) == expected[position:], position


def test_files_that_the_run_is_through_with_are_not_read(stream):
    order = torch.randperm(8, generator=generator(0, 0, "stream-order")).tolist()
    skipped = 0
    for position in range(30):
        # Of each pair, when it is read and when it is given.
        read = [f"{r} of shard {s}" for s in order for r, x in enumerate(SHARDS[s]) if x in (0, 1)]
        given = order_of(range(8), 0, 0)
        needed = {n for n in read if given.index(n) >= position}
        shards = [s for s in order if any(n.endswith(f"of shard {s}") for n in needed)]
        going_on = stream(KNOWN["all"])
        list(going_on._pairs_of(0, position))
        assert going_on.source.rows.read == shards
        skipped += 8 - len(shards)
        # Where some are not known, these are read as well, and then they are.
        going_on = stream(KNOWN["others"])
        list(going_on._pairs_of(0, position))
        assert {*going_on.source.rows.read} <= {*shards, 0, 2, 3, 4}
        assert going_on.counts.known == KNOWN["all"]
    assert skipped > 60
    own = stream({0: 9, 4: 4, 2: 0, 6: 2}, OwnShards, 0, 2)
    assert next(own._pairs_of(0, 15 * 10**4)) and len(own.source.rows.read) < 4


def test_bad_labels_keep_their_numbers(stream, monkeypatch):
    monkeypatch.setattr(Rows, "shard", lambda self, n, i: iter([{"label_0": 1.0}, {"label_0": 3}]))
    with pytest.raises(UserError, match=r"row 1 of shard \d: label_0 is 3"):
        list(stream({})._pairs_of(0, 12))


@pytest.fixture
def load(make_config, tmp_path, monkeypatch):
    """`load(directory, start=FIRST, rank=0, world=1, **flags)`: a loader of a run that keeps
    what it learns in tmp_path/run."""
    monkeypatch.setattr("sdpo.data.stream.SHUFFLE_BUFFER", HELD)
    (tmp_path / "run").mkdir()

    def make(directory, start=FIRST, rank=0, world=1, **flags):
        flags = {"resolution": 16, "max_bad_fraction": 0.5, **flags}
        config = make_config(train_data_dir=directory, streaming=True, **flags)
        return PairLoader(open_pairs(config.data, config.run.seed), config, rank, world, start)

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_where_it_was(load, make_rows, make_parquet, monkeypatch, tmp_path, workers):
    directory = make_parquet(make_rows(48, bad={3, 10, 40}), shards=6)
    first = load(directory, dataloader_num_workers=workers)
    batches = list(islice(iter(first), 30))
    assert batches[-1].place.epoch == 1
    kept = json.loads((tmp_path / "run" / ROWS_DIR / "0.json").read_text())
    assert kept["pairs"] == {str(i): 8 for i in range(6)}
    assert kept["of"]["data"]["files"] == 6
    for done in (5, 15, 20, 22, 27):
        again = load(directory, first.place_after(batches[done]), dataloader_num_workers=workers)
        for expected, found in zip(batches[done + 1 :], again, strict=False):
            assert torch.equal(expected.pixels, found.pixels)
            assert (expected.keys, expected.bad_rows) == (found.keys, found.bad_rows)


def write_tars(rows, shards, directory):
    """Tar shards whose label the columns' names tell (chosen, rejected)."""
    for shard in range(shards):
        with tarfile.open(directory / f"train-{shard}.tar", "w") as tar:
            for i in range(shard * len(rows) // shards, (shard + 1) * len(rows) // shards):
                won, lost = (rows[i][f"jpg_{side}"] for side in (i % 2, 1 - i % 2))
                members = {"chosen.png": won, "prompt.txt": b"a", "rejected.png": lost}
                for name, content in members.items():
                    info = tarfile.TarInfo(f"{i}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return directory


@pytest.mark.parametrize("kind", ["parquet", "tars"])
@pytest.mark.parametrize("shards", ["all", "own"])
def test_files_that_are_gone_are_not_missed(
    load, make_rows, make_parquet, rows_of, tmp_path, kind, shards
):
    if kind == "tars":
        directory = write_tars(make_rows(48), 6, tmp_path)
    else:
        directory = make_parquet(make_rows(48), shards=6)
    first = load(directory, stream_shards=shards)
    batches = list(islice(iter(first), 24))
    again = load(directory, first.place_after(batches[16]), stream_shards=shards)
    assert again._loader.dataset.counts.known == dict.fromkeys(range(6), 8)
    left = {row // 8 for batch in batches[17:] for row, _ in rows_of(batch)}
    assert len(left) < 5
    for shard, path in enumerate(sorted(directory.glob("train-*"))):
        if shard not in left:
            path.unlink()
    for expected, found in zip(batches[17:], again, strict=False):
        assert torch.equal(expected.pixels, found.pixels)
        assert expected.keys == found.keys
    with pytest.raises(UserError, match=r"cannot (be )?read"):
        list(islice(iter(again), 40))


def test_facts_of_other_data_are_not_believed(load, make_rows, make_parquet, tmp_path):
    def known(directory, **flags):
        return load(directory, **flags)._loader.dataset.counts.known

    labels = [0.5 if i % 4 == 0 else 1.0 for i in range(24)]
    directory = make_parquet(make_rows(24, labels=labels), shards=3)
    rows, path = make_rows(24), tmp_path / "run" / ROWS_DIR / "0.json"
    list(islice(iter(load(directory)), 10))
    assert known(directory) == {0: 6, 1: 6, 2: 6}
    assert known(make_parquet(rows, shards=3)) == {}
    assert known(directory, dreamlike_pairs_only=True) == {}
    votes = ["label=votes:extra,label_0", "image_0=jpg_0", "image_1=jpg_1", "caption=caption"]
    assert known(directory, columns=votes) == {}
    assert known(directory, columns=votes, min_agreement=0.9) == {}
    whole = json.loads(path.read_text())
    for damaged in (
        *("", "{", "[]", "null", '{"of": null, "pairs": {}}', path.read_text()[:-9]),
        *(json.dumps({**whole, "pairs": wrong}) for wrong in (None, [6], {"a": 6}, {"0": -1})),
        *(json.dumps({**whole, "pairs": {"0": wrong}}) for wrong in ("6", 6.0, True, None)),
    ):
        path.write_text(damaged)
        assert known(directory) == {}
    path.write_bytes(b"\xff\xfe\x00")
    assert known(directory) == {}
    path.write_text(json.dumps(whole))
    (path.parent / "1.json").mkdir()
    assert known(directory) == {0: 6, 1: 6, 2: 6}


def test_files_written_anew_are_counted_anew(load, make_rows, make_parquet, rows_of, monkeypatch):
    """Also where what was sampled of large files is the same."""
    monkeypatch.setattr("sdpo.data.stream_rows.describe_pairs", lambda source: {"bytes": 1})
    directory = make_parquet(make_rows(48), shards=6)
    list(islice(iter(load(directory)), 12))
    now = make_rows(48, labels=[0.5 if i % 3 else 1.0 for i in range(48)])
    make_parquet(now, shards=6, directory=directory)
    first = load(directory)
    counts = first._loader.dataset.counts
    assert counts.known == {}
    batches = list(islice(iter(first), 4))
    assert set(counts.known.values()) <= {2, 3}
    again = load(directory, first.place_after(batches[1]))
    for expected, found in zip(batches[2:], again, strict=False):
        assert rows_of(expected) == rows_of(found)


def test_processes_learn_from_each_other(load, make_rows, make_parquet):
    directory = make_parquet(make_rows(32), shards=4)
    for rank in range(2):
        list(islice(iter(load(directory, rank=rank, world=2, stream_shards="own")), 9))
    assert load(directory)._loader.dataset.counts.known == dict.fromkeys(range(4), 8)


def test_where_nothing_can_be_kept_the_run_goes_on(load, make_rows, make_parquet, tmp_path, caplog):
    directory = make_parquet(make_rows(12), shards=3)
    (tmp_path / "run" / ROWS_DIR).write_text("")
    batches = list(islice(iter(load(directory)), 8))
    assert batches[-1].place.epoch == 1
    said = [r.message for r in caplog.records if "reads its stream again" in r.message]
    assert len(said) == 1

"""One training sample: which image wins, which caption it gets, what replaces a broken one."""

from __future__ import annotations

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.order import PairOrder, Place, epoch_permutation
from sdpo.data.pairs import PairDataset, PairDecoder, collate
from sdpo.data.source import Columns, PairSource
from sdpo.data.transforms import PairTransform

COLUMNS = Columns("jpg_0", "jpg_1", "caption")


def decoder(dropout=0.0):
    return PairDecoder(COLUMNS, None, PairTransform(16), dropout)


def dataset(rows, seed=0, origin=None):
    source = PairSource(rows, COLUMNS, None, list(range(len(rows))) if origin is None else origin)
    return PairDataset(source, decoder(), PairOrder(len(rows), seed, 1))


@pytest.mark.parametrize("label", [1.0, 0.0, 1, 0])
def test_label_says_which_image_won(make_rows, rows_of, label):
    row = {**make_rows(1, labels=[label])[0]}
    pair = decoder()(row, (0, 0, 0))
    assert pair.winner.mean() == pytest.approx(100 / 127.5 - 1, abs=1e-6)
    assert pair.loser.mean() == -1
    assert pair.key == (0, 0, 0)


def test_collate_puts_winners_first(make_rows, rows_of):
    pairs = [decoder()(row, (0, 0, i)) for i, row in enumerate(make_rows(3))]
    batch = collate(pairs)
    assert batch.pixels.shape == (6, 3, 16, 16)
    assert rows_of(batch) == [(0, 0), (1, 1), (2, 2)]
    assert torch.equal(batch.pixels[4], pairs[1].loser)
    assert batch.captions == ["caption 0", "caption 1", "caption 2"]
    assert len(batch) == 3
    assert batch.place == Place(0, 0)


def captions(value, dropout, count):
    decode = decoder(dropout)
    return [decode.caption({"caption": value}, (0, 0, i)) for i in range(count)]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.7])
def test_caption_dropout_rate(share):
    found = captions("a", share, 3000)
    assert set(found) == {"", "a"}
    # Four standard deviations of a share of 3000 draws.
    assert found.count("") / 3000 == pytest.approx(
        share, abs=4 * (share * (1 - share) / 3000) ** 0.5
    )
    assert found == captions("a", share, 3000)


def test_caption_dropout_at_its_ends():
    assert set(captions("a", 0.0, 500)) == {"a"}
    assert set(captions("a", 1.0, 500)) == {""}


def test_one_of_several_captions_is_chosen_by_the_key():
    found = captions(["a", "b", "c"], 0.0, 300)
    assert found == captions(["a", "b", "c"], 0.0, 300)
    assert all(50 <= found.count(x) <= 150 for x in "abc")
    assert set(captions([], 0.0, 5)) == {""}
    assert set(captions(None, 0.0, 5)) == {""}


def test_whole_numbers_are_captions():
    assert set(captions(42, 0.0, 5)) == {"42"}
    assert set(captions([7, -1], 0.0, 50)) == {"7", "-1"}


@pytest.mark.parametrize("value", [True, 1.5, {"en": "a"}, [1.5, 2.5]])
def test_a_caption_that_is_no_text_is_refused(value):
    with pytest.raises(UserError, match=r"--caption_column caption: .* text, found \w+$"):
        captions(value, 0.0, 1)


def test_a_sample_is_a_function_of_seed_and_place(make_rows, rows_of):
    rows = make_rows(9)
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        order = epoch_permutation(9, seed, epoch).tolist()
        data = dataset(rows, seed)
        batch = collate([data[Place(epoch, i)] for i in range(9)])
        assert rows_of(batch) == [(row, row) for row in order]
        assert batch.keys == [(seed, epoch, i) for i in range(9)]


def test_a_broken_row_is_replaced_by_another_and_named(make_rows, rows_of):
    rows = make_rows(6, bad={2, 4})
    data = dataset(rows, origin=[10, 11, 12, 13, 14, 15])
    order = epoch_permutation(6, 0, 0).tolist()
    batch = collate([data[Place(0, i)] for i in range(6)])
    for position, (won, lost) in enumerate(rows_of(batch)):
        assert won == lost
        assert won not in (2, 4)
        if order[position] not in (2, 4):
            assert won == order[position]
    assert {bad.row for bad in batch.bad_rows} == {12, 14}
    assert all(bad.reason == "not in a known image format" for bad in batch.bad_rows)
    again = collate([data[Place(0, i)] for i in range(6)])
    assert torch.equal(batch.pixels, again.pixels)
    assert batch.bad_rows == again.bad_rows
    # Nothing but the image is replaced: the draws stay those of the position.
    assert batch.keys == [(0, 0, i) for i in range(6)]


def test_when_every_row_is_broken_it_gives_up(make_rows):
    data = dataset(make_rows(3, bad={0, 1, 2}))
    with pytest.raises(UserError, match=r"^3 rows cannot be decoded, .* hold encoded images$"):
        data[Place(0, 0)]


def test_files_that_are_not_there_are_named_with_what_says_where(make_rows, tmp_path):
    row = {**make_rows(1)[0], "jpg_0": str(tmp_path / "gone.png")}
    with pytest.raises(UserError) as told:
        dataset([row])[Place(0, 0)]
    assert str(told.value) == (
        f"row 0 cannot be decoded (there is no file {tmp_path / 'gone.png'}): paths of images are "
        "relative to the table they stand in; --image_root DIR names another place"
    )

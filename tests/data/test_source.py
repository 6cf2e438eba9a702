"""Opening data: where from, which rows, and what is said when it cannot be."""

from __future__ import annotations

import csv
import json
import logging

import pytest

from sdpo.common.errors import UserError
from sdpo.data.source import open_pairs


def kept(source):
    return [int(c.removeprefix("caption ")) for c in source.rows[source.columns.caption]]


@pytest.fixture
def opened(make_config):
    """`opened(directory, **flags)`: the pairs of a local directory."""

    def open_them(directory, **flags):
        config = make_config(train_data_dir=directory, **flags)
        return open_pairs(config.data, config.run.seed)

    return open_them


def test_parquet_shards_and_splits(opened, pairs_dir):
    import pyarrow.parquet as pq

    def decided(split):
        tables = [pq.read_table(path) for path in sorted(pairs_dir.glob(f"{split}-*.parquet"))]
        labels = [x for table in tables for x in table["label_0"].to_pylist()]
        return len(tables), len(labels), [i for i, x in enumerate(labels) if x != 0.5]

    for split, shards, rows in (("train", 2, 64), ("heldout", 1, 16)):
        source = opened(pairs_dir, split=split)
        assert decided(split)[:2] == (shards, rows)
        assert source.origin.tolist() == decided(split)[2]
        assert len(source) == len(decided(split)[2])
        assert (source.columns.image_0, source.columns.image_1) == ("jpg_0", "jpg_1")
    assert len(decided("train")[2]) < 64, "this test wants ties"


def test_dataset_name_may_be_a_local_directory(make_config, pairs_dir):
    by_name = open_pairs(make_config(dataset_name=str(pairs_dir)).data, 0)
    by_dir = open_pairs(make_config(train_data_dir=pairs_dir).data, 0)
    assert by_name.rows["caption"][:] == by_dir.rows["caption"][:]


def test_parquet_in_a_data_folder(opened, make_rows, make_parquet, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    make_parquet(make_rows(5), directory=tmp_path / "set" / "data")
    assert kept(opened(tmp_path / "set")) == [0, 1, 2, 3, 4]


def test_one_file_without_a_split_in_its_name(opened, make_rows, make_parquet):
    directory = make_parquet(make_rows(5))
    next(directory.iterdir()).rename(directory / "mine.parquet")
    assert kept(opened(directory)) == [0, 1, 2, 3, 4]


def test_unknown_split_names_those_there_are(make_config, pairs_dir):
    with pytest.raises(UserError, match=r"--split: .*'test'.*heldout, train"):
        make_config(split="test")


def test_a_directory_of_nothing_that_is_read_is_told_what_is(make_config, tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"metadata\.jsonl or .*parquet.*tar.*w.*l.*save_to_disk"):
        make_config(train_data_dir=tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("in_split_folder", [False, True])
def test_folder_with_metadata(opened, make_rows, tmp_path, kind, in_split_folder):
    base = tmp_path / "set" / "train" if in_split_folder else tmp_path / "set"
    (base / "images").mkdir(parents=True)
    entries = []
    for i, row in enumerate(make_rows(4)):
        for side in (0, 1):
            (base / f"images/{i}_{side}.png").write_bytes(row[f"jpg_{side}"])
        images = {f"image_{side}": f"images/{i}_{side}.png" for side in (0, 1)}
        entries.append({"caption": row["caption"], "label_0": row["label_0"], **images})
    with open(base / f"metadata.{kind}", "w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        else:
            writer = csv.DictWriter(file, entries[0])
            writer.writeheader()
            writer.writerows(entries)
    source = opened(tmp_path / "set")
    assert source.base == base
    assert kept(source) == [0, 1, 2, 3]
    assert source.rows[1]["image_0"] == "images/1_0.png"
    assert (source.columns.image_0, source.columns.image_1) == ("image_0", "image_1")


def test_ties_and_rows_without_label_are_dropped_and_counted(
    opened, make_rows, make_parquet, caplog
):
    rows = make_rows(8, labels=[1.0, 0.5, 0.0, None, 0.5, 1.0, None, 0.0])
    with caplog.at_level(logging.INFO, "sdpo"):
        source = opened(make_parquet(rows, shards=2))
    assert kept(source) == [0, 2, 5, 7]
    assert source.origin.tolist() == [0, 2, 5, 7]
    told = "8 rows: 4 decided pairs, 2 ties dropped, 2 without a label dropped"
    assert told in caplog.text


def test_whole_number_labels(opened, make_rows, make_parquet):
    rows = [{**row, "label_0": int(row["label_0"])} for row in make_rows(4)]
    assert kept(opened(make_parquet(rows))) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [1.5, {"en": "a"}, b"a", True, [2.5]])
@pytest.mark.parametrize("streaming", [False, True])
def test_captions_that_are_no_text_are_refused(opened, make_rows, make_parquet, value, streaming):
    rows = [{**row, "caption": value} for row in make_rows(2)]
    with pytest.raises(
        UserError, match=r"^--caption_column caption: captions must be text"
    ) as said:
        opened(make_parquet(rows), streaming=streaming)
    floats = isinstance(value, float | list)
    assert ("write the column as text" in str(said.value)) == floats


def test_nothing_left_is_refused(opened, make_rows, make_parquet):
    with pytest.raises(UserError, match="no pair is left"):
        opened(make_parquet(make_rows(3, labels=[0.5] * 3)))


@pytest.mark.parametrize("label", [2.0, -1.0, 1.1, float("nan")])
def test_an_invalid_label_names_its_row(opened, make_rows, make_parquet, label):
    rows = make_rows(5, labels=[1.0, 0.5, None, label, 0.0])
    with pytest.raises(UserError, match=rf"row 3: label_0 is {label}; it must be 1 "):
        opened(make_parquet(rows, shards=2))


def test_labels_that_are_no_numbers(opened, make_rows, make_parquet):
    rows = [{**row, "label_0": "first"} for row in make_rows(2)]
    with pytest.raises(UserError, match="label_0 must hold 0 "):
        opened(make_parquet(rows))


@pytest.mark.parametrize(
    ("gone", "flags", "message"),
    [
        ("jpg_1", {}, "--train_data_dir: .* no column jpg_1 or image_1; .*jpg_0, label_0"),
        ("label_0", {}, "--train_data_dir: .* no column label_0"),
        ("caption", {}, "--caption_column: .* no column caption; .*extra"),
        ("model_1", {"dreamlike_pairs_only": True}, "--dreamlike_pairs_only: .* model_1"),
        ("model_1", {"caption_column": "text"}, "--caption_column: .* no column text"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named(
    opened, make_rows, make_parquet, gone, flags, message, streaming
):
    rows = [{k: v for k, v in row.items() if k != gone} for row in make_rows(3)]
    with pytest.raises(UserError, match=message):
        opened(make_parquet(rows), streaming=streaming, **flags)


def test_only_the_columns_in_use_are_read(opened, make_rows, make_parquet):
    source = opened(make_parquet(make_rows(3)))
    assert sorted(source.rows.column_names) == ["caption", "jpg_0", "jpg_1", "label_0"]


def test_dreamlike_pairs_only(opened, make_rows, make_parquet):
    directory = make_parquet(make_rows(24))
    source = opened(directory, dreamlike_pairs_only=True)
    assert kept(source) == [i for i in range(24) if i % 3 and i % 4 != 1]
    assert 0 < len(source) < 24


def test_max_train_samples_is_a_choice_by_the_seed(opened, make_rows, make_parquet):
    labels = [0.5 if i % 5 == 0 else 1.0 for i in range(40)]
    directory = make_parquet(make_rows(40, labels=labels))
    chosen = {seed: kept(opened(directory, max_train_samples=8, seed=seed)) for seed in (0, 1)}
    assert chosen[0] == kept(opened(directory, max_train_samples=8, seed=0))
    assert chosen[0] != chosen[1]
    for rows in chosen.values():
        assert len(set(rows)) == 8
        assert all(row % 5 for row in rows)
    source = opened(directory, max_train_samples=8)
    assert source.origin.tolist() == kept(source)
    assert len(opened(directory, max_train_samples=1000)) == 32


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_without_a_network_is_one_sentence(make_config, streaming):
    config = make_config(dataset_name="somebody/no-such-pairs", streaming=streaming)
    with pytest.raises(UserError) as caught:
        open_pairs(config.data, 0)
    message = str(caught.value)
    assert message.startswith("--dataset_name: cannot ")
    assert "somebody/no-such-pairs" in message
    assert "\n" not in message


def test_a_broken_parquet_file_is_one_sentence(opened, tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert str(caught.value).startswith("--train_data_dir: cannot ")
    assert "\n" not in str(caught.value)


def test_image_features_are_not_decoded(opened, make_rows, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(make_rows(3))
    rows = rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    rows.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    value = opened(tmp_path).rows[0]["jpg_0"]
    assert isinstance(value, dict)
    assert value["bytes"].startswith(b"\x89PNG")


class FakeBuilder:
    """Gives rows as a builder of `datasets` does, and notes what it is asked for."""

    def __init__(self, rows, asked):
        self.rows, self.asked = rows, asked

    def download_and_prepare(self):
        self.asked.append("prepared")

    def as_dataset(self, split):
        self.asked.append(split)
        return self.rows

    def as_streaming_dataset(self, split):
        self.asked.append(split)
        return self.rows.to_iterable_dataset()


def test_what_is_asked_of_the_hub(make_config, make_rows, monkeypatch):
    import datasets

    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return FakeBuilder(datasets.Dataset.from_list(make_rows(4)), asked)

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    flags = {"dataset_name": "someone/pairs", "dataset_config_name": "large", "split": "test"}
    source = open_pairs(make_config(**flags, cache_dir="/some/cache").data, 0)
    assert len(source) == 4
    first = (("someone/pairs", "large"), {"cache_dir": "/some/cache"})
    assert asked == [first, "prepared", "test"]
    stream = open_pairs(make_config(**flags, streaming=True, cache_dir="/some/cache").data, 0)
    assert [row["caption"] for row in stream.rows] == source.rows["caption"][:]
    assert asked[3:] == [first, "test"]


@pytest.mark.parametrize("streaming", [False, True])
def test_pick_a_pic_s_mirror_is_tried_after_it(
    make_config, make_rows, monkeypatch, caplog, streaming
):
    import datasets

    asked = []

    def load(name, config, **options):
        asked.append(name)
        if name == "yuvalkirstain/pickapic_v2":
            raise ConnectionError("gone\nreally")
        return FakeBuilder(datasets.Dataset.from_list(make_rows(4)), [])

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    config = make_config(dataset_name="yuvalkirstain/pickapic_v2", streaming=streaming)
    with caplog.at_level(logging.WARNING, "sdpo"):
        source = open_pairs(config.data, 0)
    assert len(list(source.rows)) == 4
    assert asked == ["yuvalkirstain/pickapic_v2", "liuhuohuo2/pick-a-pic-v2"]
    assert "cannot open yuvalkirstain/pickapic_v2 (ConnectionError: gone)" in caplog.text
    assert "reading its mirror liuhuohuo2/pick-a-pic-v2" in caplog.text


def test_without_any_mirror_the_local_layout_is_said(make_config):
    config = make_config(dataset_name="yuvalkirstain/pickapic_v2")
    with pytest.raises(UserError) as caught:
        open_pairs(config.data, 0)
    said = str(caught.value)
    assert said.startswith("--dataset_name: cannot open yuvalkirstain/pickapic_v2 (")
    assert "nor its mirror liuhuohuo2/pick-a-pic-v2 (" in said and "\n" not in said
    assert "--train_data_dir DIR: train-00000-of-....parquet in DIR or DIR/data" in said


def test_a_split_that_is_not_there_asks_no_mirror(make_config, monkeypatch):
    import datasets

    def load(name, config, **options):
        assert name == "yuvalkirstain/pickapic_v2"
        raise ValueError("Unknown split \"tset\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    config = make_config(dataset_name="yuvalkirstain/pickapic_v2", split="tset")
    with pytest.raises(UserError, match=r"--split: yuvalkirstain/pickapic_v2 has no split 'tset'"):
        open_pairs(config.data, 0)

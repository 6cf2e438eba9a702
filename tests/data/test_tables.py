"""Tables of pairs are read as they are written: text stays text, and types are not guessed."""

from __future__ import annotations

import csv
import json
import os
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.common.errors import UserError
from sdpo.common.images import UndecodableImage, open_image
from sdpo.data.digest import describe_pairs
from sdpo.data.latents.identity import dataset_digest
from sdpo.data.loader import PairLoader
from sdpo.data.source import open_pairs

HEAD = "caption,image_0,image_1,label_0\n"
TRICKY = ["None", "NA", "null", "nan", "N/A", "0042", "7", "1e5", "True", "2021-01-01", "a, b", ""]


@pytest.fixture
def opened(make_config):
    """`opened(directory, **flags)`: the pairs of a local directory."""

    def open_them(directory, **flags):
        config = make_config(train_data_dir=directory, **flags)
        return open_pairs(config.data, config.run.seed)

    return open_them


@pytest.fixture
def refusal(make_config):
    """`refusal(directory, **flags)`: the one sentence that reading a batch of it ends in."""

    def read(directory, **flags):
        with pytest.raises(UserError) as caught:
            config = make_config(train_data_dir=directory, resolution=16, **flags)
            next(iter(PairLoader(open_pairs(config.data, 0), config, 0, 1)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def row(i, **values):
    return {"caption": f"c{i}", "image_0": f"{i}_0.png", "image_1": f"{i}_1.png"} | values


@pytest.mark.parametrize("captions", [TRICKY, ["None"] * 3, ["1", "2", "3"], ["1.50", "2", "3"]])
@pytest.mark.parametrize("streaming", [False, True])
def test_captions_of_csv_are_text(opened, tmp_path, captions, streaming):
    rows = [row(i, caption=c, label_0=i % 2) for i, c in enumerate(captions)]
    write_csv(tmp_path / "metadata.csv", rows)
    found = [r["caption"] for r in opened(tmp_path, streaming=streaming).rows]
    assert [c or "" for c in found] == captions


def test_captions_of_json_lines_are_as_written(opened, tmp_path):
    lines = [
        '{"caption": 1.50, "image_0": "001", "image_1": "b", "label_0": 1}',
        '{"caption": "2021-01-01", "image_0": "002", "image_1": "b", "label_0": 0.0}',
        '{"caption": "NA\\u2028", "image_0": "003", "image_1": "b", "label_0": true}',
        '{"caption": null, "image_0": "NA", "image_1": "b", "label_0": "0"}',
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    source = opened(tmp_path)
    assert source.rows["caption"][:] == ["1.50", "2021-01-01", "NA\u2028", None]
    assert source.rows["image_0"][:] == ["001", "002", "003", "NA"]
    assert source.rows["label_0"][:] == [1.0, 0.0, 1.0, 0.0]


def test_rows_without_a_caption_are_told(opened, refusal, caplog, tmp_path):
    captions = ["a", None, "", "b"]
    rows = [row(i, caption=c, label_0=1) for i, c in enumerate(captions)]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("WARNING", "sdpo"):
        assert len(opened(tmp_path)) == 4
    assert "2 of 4 pairs have nothing in column caption" in caplog.text
    path.write_text("\n".join(json.dumps(r) for r in rows[1:3]))
    assert "column caption is empty in all 2 pairs" in refusal(tmp_path)


def test_objects_are_no_captions(refusal, tmp_path):
    rows = [row(i, caption={"en": f"c{i}", "width": i}, label_0=1) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "captions must be text or lists of text, found {'en'" in refusal(tmp_path)


def test_images_as_objects_of_path_and_bytes(opened, tmp_path):
    rows = [row(i, image_0={"path": f"{i}_0.png", "bytes": None}, label_0=1) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert source.rows[2]["image_0"] == {"path": "2_0.png", "bytes": None}
    (tmp_path / "2_0.png").write_bytes(b"\x89PNG")
    with pytest.raises(UndecodableImage, match="not in a known image format"):
        open_image(source.rows[2]["image_0"], source.base)  # the file was found


def test_half_a_character_names_its_row(refusal, tmp_path):
    lines = [json.dumps(row(0, label_0=1)), json.dumps(row(1, label_0=1, caption="x \ud800"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert "row 1: caption holds half a character (\\ud800)" in refusal(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_without_rows(opened, refusal, make_rows, tmp_path, streaming):
    table = pa.Table.from_pylist(make_rows(3))
    for shard, part in enumerate((table.slice(0, 0), table, table.slice(0, 0))):
        pq.write_table(part, tmp_path / f"train-{shard:05d}-of-00003.parquet")
    source = opened(tmp_path, streaming=streaming)
    assert [r["caption"] for r in source.rows] == table["caption"].to_pylist()
    (tmp_path / "train-00001-of-00003.parquet").write_bytes(
        (tmp_path / "train-00000-of-00003.parquet").read_bytes()
    )
    assert "holds no rows" in refusal(tmp_path, streaming=streaming)


@pytest.mark.skipif(int(pa.__version__.split(".")[0]) < 18, reason="Arrow casts no views")
def test_views_of_text_and_bytes(opened, make_rows, tmp_path):
    table = pa.Table.from_pylist(make_rows(3))
    kinds = {"caption": pa.string_view(), "jpg_0": pa.binary_view()}
    schema = pa.schema([(f.name, kinds.get(f.name, f.type)) for f in table.schema])
    pq.write_table(table.cast(schema), tmp_path / "train.parquet")
    source = opened(tmp_path)
    assert describe_pairs(source)["pairs"] == 3
    assert len(dataset_digest(source)) == 64
    assert source.rows[1]["caption"] == "caption 1"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_ties_may_come_late(opened, tmp_path, kind):
    labels = [i % 2 for i in range(10_500)] + [0.5, None, 1]
    rows = [row(i, label_0=label) for i, label in enumerate(labels)]
    if kind == "csv":
        write_csv(tmp_path / "metadata.csv", rows)
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path)
    assert len(source) == 10_501
    assert source.origin[-1] == 10_502


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_shards_may_differ_in_types_and_extra_columns(
    opened, make_rows, tmp_path, first, streaming
):
    rows = make_rows(6)
    whole = [{**r, "label_0": int(r["label_0"]), "more": "x"} for r in rows[:3]]
    parts = [whole, rows[3:]]
    for shard in (0, 1):
        table = pa.Table.from_pylist(parts[shard ^ first])
        pq.write_table(table, tmp_path / f"train-{shard:05d}-of-00002.parquet")
    source = opened(tmp_path, streaming=streaming)
    found = {r["caption"]: float(r["label_0"]) for r in source.rows}
    assert found == {r["caption"]: r["label_0"] for r in rows}


def test_a_column_that_one_shard_lacks_is_named(opened, make_rows, tmp_path):
    rows = make_rows(4)
    without = [{k: v for k, v in r.items() if k != "caption"} for r in rows]
    for shard, part in enumerate((rows, without)):
        path = tmp_path / f"train-{shard:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path)
    with pytest.raises(UserError, match="--caption_column: the data has no column caption"):
        opened(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.csv", HEAD.encode() + b"a,b,c,first\n", "row 0: label_0 is 'first'"),
        ("metadata.csv", HEAD.encode() + b"a,b,c,1\na,b,c,7\n", "row 1: label_0 is 7.0"),
        ("metadata.csv", HEAD.encode() + b"a,b,c,1\na\xe9,b,c,0\n", "line 3: byte 0xe9"),
        ("metadata.csv", HEAD.encode() + b"a,b,c,1\na, b,b,c,0\n", "line 3: 5 cells"),
        ("metadata.csv", HEAD.encode() + b'"a"x,b,c,1\n', "line 2 is not CSV"),
        ("metadata.csv", HEAD.encode(), "holds no rows"),
        ("metadata.csv", b"", "holds no rows"),
        ("metadata.csv", b"caption,caption\na,b\n", "column 'caption' is there twice"),
        ("metadata.csv", HEAD.replace(",", ";").encode() + b"a;b;c;1\n", "caption;image_0"),
        ("metadata.jsonl", json.dumps(row(0, label_0=1)).encode() + b"\n{", "line 2 is not JSON"),
        ("metadata.jsonl", b'{"caption": "\xe9"}\n', "line 1: byte 0xe9"),
        ("metadata.jsonl", b'"caption"\n', "line 1: a row must be an object"),
        ("metadata.jsonl", json.dumps(row(0, label_0="first")).encode(), "label_0 is 'first'"),
        ("metadata.jsonl", b"\n", "holds no rows"),
        ("metadata.jsonl", b'{"caption": "a", "caption": "b"}', "line 1 is not JSON: 'caption' is"),
    ],
)
def test_what_is_wrong_is_one_sentence(refusal, tmp_path, name, content, said, streaming):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_parquet_is_one_sentence(refusal, make_rows, make_parquet, tmp_path, streaming):
    text = [{**r, "label_0": "first"} for r in make_rows(2)]
    assert "row 0: label_0 is 'first'" in refusal(make_parquet(text), streaming=streaming)
    empty = pa.Table.from_pylist(make_rows(2)).slice(0, 0)
    pq.write_table(empty, tmp_path / "train.parquet")
    assert refusal(tmp_path, streaming=streaming)


def test_a_file_that_is_replaced_is_read_anew(opened, make_rows, tmp_path):
    path = tmp_path / "train.parquet"
    found = []
    for first in ("A", "B"):
        rows = [{**r, "caption": first + r["caption"]} for r in make_rows(3)]
        # Compressed, their sizes would hang on the writer's version.
        pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
        os.utime(path, (1_000_000_000, 1_000_000_000))
        found.append((path.stat().st_size, opened(tmp_path).rows["caption"][0]))
    assert found[0][0] == found[1][0], "this test wants files of one size"
    assert [caption for _, caption in found] == ["Acaption 0", "Bcaption 0"]


def test_metadata_that_is_replaced_is_read_anew(opened, tmp_path):
    path = tmp_path / "metadata.jsonl"
    for caption in ("aa", "bb"):
        path.write_text(json.dumps(row(0, caption=caption, label_0=1)))
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert opened(tmp_path).rows["caption"][:] == [caption]


@pytest.mark.parametrize("name", ["x[1]", "x*", "x?", "{x}", "a split"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_s_name_is_no_pattern(
    opened, make_rows, make_parquet, tmp_path, name, streaming
):
    for folder, first in ((name, "right "), ("x1", "wrong ")):
        (tmp_path / folder).mkdir()
        rows = [{**r, "caption": first + r["caption"]} for r in make_rows(2)]
        make_parquet(rows, directory=tmp_path / folder)
    rows = list(islice(opened(tmp_path / name, streaming=streaming).rows, 3))
    assert [r["caption"] for r in rows] == ["right caption 0", "right caption 1"]


@pytest.mark.parametrize(
    "pattern",
    ["{}_0", "{}-1", "{}", "{}.7", "{}00", "{}_0001-00000-of-00001", "data/{}-00000-of-00001"],
)
@pytest.mark.parametrize("suffix", [".parquet", ".PARQUET"])
def test_splits_by_the_files_names(opened, make_rows, tmp_path, pattern, suffix):
    splits = ("train", "test", "validation")
    (tmp_path / "data").mkdir()
    for split in splits:
        rows = [{**r, "caption": split} for r in make_rows(2)]
        path = tmp_path / (pattern.format(split) + suffix)
        pq.write_table(pa.Table.from_pylist(rows), path)
    for split in splits:
        assert opened(tmp_path, split=split).rows["caption"][:] == [split, split]
    with pytest.raises(UserError, match=r"--split: .*'heldout'.*test, train, validation"):
        opened(tmp_path, split="heldout")


def test_split_is_refused_where_nothing_names_one(opened, make_rows, make_parquet, tmp_path):
    for folder in ("one", "text"):
        (tmp_path / folder).mkdir()
    pq.write_table(pa.Table.from_pylist(make_rows(2)), tmp_path / "one" / "mine.parquet")
    (tmp_path / "text" / "metadata.jsonl").write_text(json.dumps(row(0, label_0=1)))
    for folder in ("one", "text"):
        assert len(opened(tmp_path / folder, split="train"))
        with pytest.raises(UserError, match=r"--split: nothing in .* names a split"):
            opened(tmp_path / folder, split="validation_unique")
        # Named by the directory itself.
        (tmp_path / folder).rename(tmp_path / "heldout")
        assert len(opened(tmp_path / "heldout", split="heldout"))
        (tmp_path / "heldout").rename(tmp_path / f"{folder} done")


def test_a_file_of_another_split_alone_is_not_train(opened, make_rows, tmp_path):
    pq.write_table(pa.Table.from_pylist(make_rows(2)), tmp_path / "validation.parquet")
    with pytest.raises(UserError, match=r"--split: .*'train'; it has those of: validation"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["train-00000-of-00003"], r"train-00000-of-00003.parquet: .* 2 are missing \(number 1, 2"),
        (["train-00001-of-00002"], r"train-00001-of-00002.parquet: .* 1 are missing \(number 0"),
        (["train-00000-of-00001", "train_00000-of-00001"], "are the same shard"),
        (["train-00000-of-00001", "data/train-00000-of-00001"], "are the same shard"),
        (["a-00000-of-00002-0123456789abcdef"], "1 are missing"),
    ],
)
def test_missing_shards_are_refused_by_name(opened, make_rows, tmp_path, there, said):
    (tmp_path / "data").mkdir()
    for name in there:
        pq.write_table(pa.Table.from_pylist(make_rows(2)), tmp_path / f"{name}.parquet")
    split = "a" if there[0].startswith("a") else "train"
    with pytest.raises(UserError, match=said):
        opened(tmp_path, split=split)


def test_upper_case_metadata(opened, tmp_path):
    (tmp_path / "METADATA.JSONL").write_text(json.dumps(row(0, label_0=1)))
    assert opened(tmp_path).rows["caption"][:] == ["c0"]


def test_rows_read_here_have_files_in_the_cache(opened, tmp_path):
    write_csv(tmp_path / "metadata.csv", [row(0, label_0=1)])
    files = opened(tmp_path, cache_dir=str(tmp_path / "cache")).rows.cache_files
    assert files and str(tmp_path / "cache") in files[0]["filename"]

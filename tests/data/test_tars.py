"""Webdataset's tar shards: files of one stem are a row, mapped and streamed; damage is told."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice

import pytest

from sdpo.common.errors import UserError
from sdpo.data.loader import PairLoader
from sdpo.data.source import open_pairs


def write_tar(path, members):
    """Write [(name, bytes), ...] in that order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def by_label(i, row):
    about = {"caption": row["caption"], "label_0": row["label_0"], "width": 64, "tags": ["a", 1]}
    return [
        (f"{i:04d}.jpg_0", row["jpg_0"]),
        (f"{i:04d}.jpg_1", row["jpg_1"]),
        (f"{i:04d}.json", json.dumps(about).encode()),
    ]


def by_number(i, row):
    suffix = "PNG" if i % 2 else "webp"  # a column may come in several formats
    return [
        (f"./a.b/{i:04d}.0.{suffix}", row["jpg_0"]),
        (f"./a.b/{i:04d}.1.png", row["jpg_1"]),
        (f"./a.b/{i:04d}.label_0", str(row["label_0"]).encode()),
        (f"./a.b/{i:04d}.txt", row["caption"].encode() + b"\n"),
    ]


def by_order(i, row):
    images = row["jpg_0"], row["jpg_1"]
    won, lost = images if row["label_0"] == 1 else images[::-1]
    return [
        (f"{i:04d}.chosen.png", won),
        (f"{i:04d}.prompt.txt", row["caption"].encode()),
        (f"{i:04d}.rejected.png", lost),
    ]


@pytest.fixture
def opened(make_config, tmp_path):
    """`opened(streaming)`: config and pairs of the tars in tmp_path."""

    def open_them(streaming=False, **flags):
        flags = {"resolution": 16, "train_batch_size": 1, "proportion_empty_prompts": 0, **flags}
        config = make_config(
            train_data_dir=tmp_path, streaming=streaming, cache_dir=tmp_path / "cache", **flags
        )
        return config, open_pairs(config.data, 0)

    return open_them


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", [by_label, by_number, by_order])
@pytest.mark.parametrize("name", ["train-{:06d}", "shard-{:06d}", "{:05d}", "data/x_{}"])
def test_files_of_one_stem_are_a_row(opened, make_rows, rows_of, tmp_path, streaming, layout, name):
    (tmp_path / "data").mkdir()
    rows = [layout(i, row) for i, row in enumerate(make_rows(6))]
    for shard in range(2):
        part = [member for row in rows[3 * shard : 3 * shard + 3] for member in row]
        write_tar(tmp_path / f"{name.format(shard)}.tar", [("._0.png", b""), *part])
    config, source = opened(streaming)
    found = {}
    for batch in islice(iter(PairLoader(source, config, 0, 1)), 6):
        ((winner, loser),) = rows_of(batch)
        assert winner == loser
        assert batch.pixels[0].mean() > batch.pixels[1].mean()
        found[winner] = batch.captions[0]
    assert found == {i: f"caption {i}" for i in range(6)}
    if streaming:
        assert source.rows.num_shards == 2


def test_replaced_shards_are_read_anew(opened, make_rows, tmp_path):
    for caption in ("a", "b"):
        rows = [{**row, "caption": caption} for row in make_rows(1)]
        write_tar(tmp_path / "train.tar", by_label(0, rows[0]))
        assert opened()[1].rows["caption"][:] == [caption]


def test_a_row_that_lacks_an_image_is_a_bad_one(opened, make_rows, tmp_path):
    rows = [by_label(i, row) for i, row in enumerate(make_rows(4))]
    write_tar(tmp_path / "train.tar", [*rows[0], *rows[1][1:], *rows[2], *rows[3]])
    config, source = opened(max_bad_fraction=1.0)
    loader = PairLoader(source, config, 0, 1)
    list(islice(iter(loader), 4))
    assert loader.counter.rows == {1}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: [m[0], m[3], m[1], m[2]], "the files of 0000 do not lie together"),
        (lambda m: [*m, ("0000.x.json", b"{}")], "the files of 0000 do not lie together"),
        (lambda m: [*m[:3], ("0000.JPG_0", b""), *m[3:]], "0000 has jpg_0 twice"),
        (lambda m: [("a.json", b"{"), *m], "train.tar, a.json is not JSON"),
        (lambda m: [("a.json", b"[1]"), *m], "train.tar, a.json must hold an object"),
        (lambda m: [("a.txt", b"\xe9"), *m], "train.tar, a.txt is not UTF-8"),
        (lambda m: [("a.jpg_0", b""), ("a.label_0", b"x"), *m], "train.tar, a: label_0 is 'x'"),
        (lambda m: [("readme", b"")], "holds no files that are called STEM.COLUMN"),
        (lambda m: m[1:3], "has no column jpg_0 or image_0; its columns are: jpg_1, caption"),
        (lambda m: [*m, ("b.json", b'{"jpg_0": "p"}')], "b: jpg_0 is a file of its own in some"),
    ],
)
def test_what_cannot_be_rows_is_said(opened, make_rows, tmp_path, change, said, streaming):
    members = [member for i, row in enumerate(make_rows(2)) for member in by_label(i, row)]
    write_tar(tmp_path / "train.tar", change(members))
    with pytest.raises(UserError, match=said) as caught:
        config, source = opened(streaming)
        list(islice(iter(PairLoader(source, config, 0, 1)), 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 600, 2048, 0.4, -10240])
def test_a_shard_that_is_cut_off_is_refused(opened, make_rows, tmp_path, keep):
    path = tmp_path / "train.tar"
    members = [member for i, row in enumerate(make_rows(9)) for member in by_label(i, row)]
    write_tar(path, members)
    whole = path.read_bytes()
    end = whole.rstrip(b"\0")
    cut = {-10240: -(-len(end) // 512) * 512, 0.4: int(0.4 * len(whole))}.get(keep, keep)
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"train\.tar (cannot be read|is damaged or cut off)"):
        opened()

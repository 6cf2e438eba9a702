"""What tells the pairs of a run from others'."""

from __future__ import annotations

import io
import json
import tarfile
from types import SimpleNamespace

import pytest

from sdpo.data import digest
from sdpo.data.digest import changes, describe_pairs
from sdpo.data.source import open_pairs


@pytest.fixture
def described(make_config):
    def describe(directory, **flags):
        flags = {"train_data_dir": directory, "streaming": True, **flags}
        return describe_pairs(open_pairs(make_config(**flags).data, 0))

    return describe


def stream_of(*names, kind="files"):
    """A source as `open_pairs` gives one of the hub that is streamed, its columns chosen."""
    files = SimpleNamespace(kwargs={kind: list(names)})
    rows = SimpleNamespace(_ex_iterable=SimpleNamespace(ex_iterable=files))
    return SimpleNamespace(origin=None, rows=rows)


def test_parquet_that_is_streamed(described, make_rows, make_parquet):
    rows = make_rows(3)
    path = make_parquet(rows)
    before = described(path)
    assert before == described(path)
    assert before["files"] == 1
    assert changes(before, described(path)) is None
    rows[1]["caption"] = rows[1]["caption"][::-1]
    now = described(make_parquet(rows))
    assert now["sha256"] != before["sha256"]
    assert changes(before, {**now, "bytes": before["bytes"]}) == (
        "still 1 files, but of other content"
    )


def test_a_table_that_is_streamed(described, tmp_path):
    row = {"caption": "a", "image_0": "0.png", "image_1": "1.png", "label_0": 1}
    found = []
    for caption in ("a", "b", "b"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, "caption": caption}))
        found.append(described(tmp_path))
    assert found[0]["sha256"] != found[1]["sha256"]
    assert found[1] == found[2]


def test_tar_shards_that_are_streamed(described, make_rows, tmp_path):
    found = []
    for caption in ("a", "b", "b"):
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            row = make_rows(1)[0]
            about = json.dumps({"caption": caption, "label_0": row["label_0"]}).encode()
            for name, content in (
                ("jpg_0", row["jpg_0"]),
                ("jpg_1", row["jpg_1"]),
                ("json", about),
            ):
                info = tarfile.TarInfo(f"0.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        found.append(described(tmp_path))
    assert found[0]["files"] == 1
    assert found[0]["sha256"] != found[1]["sha256"]
    assert found[1] == found[2]


def test_a_picture_that_is_replaced_under_its_name(described, make_rows, tmp_path, monkeypatch):
    count = 5
    for i, row in enumerate(make_rows(count)):
        for side in (0, 1):
            (tmp_path / f"{i}_{side}.png").write_bytes(row[f"jpg_{side}"])
    table = [
        {"caption": "a", "image_0": f"{i}_0.png", "image_1": f"{i}_1.png", "label_0": 1}
        for i in range(count)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    before = described(tmp_path, streaming=False)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.png"))
    assert before["bytes of image data"] == size
    path = tmp_path / "3_1.png"
    path.write_bytes(path.read_bytes() + b"more")
    now = described(tmp_path, streaming=False)
    assert changes(before, now) == f"{size} bytes of image data, now {size + 4}"
    monkeypatch.setattr(digest, "ASKED_ROWS", 2)  # the first and the last
    ends = sum((tmp_path / f"{i}_{side}.png").stat().st_size for i in (0, 4) for side in (0, 1))
    some = described(tmp_path, streaming=False)
    assert some["bytes of image data in 2 rows"] == ends
    assert changes(before, some) is None
    # A former version counted the lengths of paths.
    former = {"pairs": 6, "bytes of images": 70, "sha256": "0"}
    assert changes(former, some) == "6 pairs, now 5"


def test_files_of_the_hub_go_by_their_commit():
    names = [f"hf://datasets/a/b@{commit}/train.parquet" for commit in ("1" * 40, "2" * 40)]
    first, second = (describe_pairs(stream_of(name)) for name in names)
    assert changes(first, second) == "still 1 files, but of other content"
    assert changes(first, describe_pairs(stream_of(*names))) == "1 files, now 2"
    wrapped = describe_pairs(stream_of([names[0]]))  # as datasets 4.0 does
    assert wrapped == first
    assert describe_pairs(stream_of(names[0], kind="tar_paths")) == first


def test_a_stream_of_unknown_files_is_not_described(described, pairs_dir):
    assert describe_pairs(stream_of()) is None
    assert describe_pairs(SimpleNamespace(origin=None, rows=object())) is None
    pairs = described(pairs_dir, streaming=False)
    assert changes(pairs, described(pairs_dir)) is None  # pairs and files are not compared

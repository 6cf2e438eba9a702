"""Tables of the hub are read as local ones: text stays text, under every reader of `datasets`."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import pytest

from sdpo.common.errors import UserError
from sdpo.data.source import open_pairs

CAPTIONS = ["NA", "null", "None", "0042", "2020-01-01", "1e5", "plain", "nan"]
LABELS = [1, 0, "0.5", "NA", True, 1.0, 0, 1]
KEPT = ["NA", "null", "2020-01-01", "1e5", "plain", "nan"]  # without the tie and the missing label


@pytest.fixture
def hub(monkeypatch, tmp_path, make_config):
    """`hub(files)`: a dataset of the hub whose files are those; what its builder finds it is
    asked of `datasets` itself, by the files' names and content."""
    load = datasets.load_dataset_builder

    def open_it(file, options=None, **flags):
        def found(name, config, cache_dir):
            assert (name, config) == ("someone/pairs", None)
            kind = "json" if ".json" in file.name else "csv"
            return load(
                kind, data_files={"train": [str(file)]}, cache_dir=cache_dir, **(options or {})
            )

        monkeypatch.setattr(datasets, "load_dataset_builder", found)
        config = make_config(dataset_name="someone/pairs", cache_dir=tmp_path / "cache", **flags)
        return open_pairs(config.data, 0)

    return open_it


def records():
    return [
        {"caption": c, "image_0": f"{i}.png", "image_1": "1.png", "label_0": label}
        for i, (c, label) in enumerate(zip(CAPTIONS, LABELS, strict=True))
    ]


def write_csv(path, separator=","):
    rows = records()
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def captions(source):
    wanted = [row for row in source.rows if row["label_0"] in (0.0, 1.0)]
    return [row["caption"] for row in wanted]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.csv.gz"])
def test_csv(hub, tmp_path, name, streaming):
    path = write_csv(tmp_path / "plain", "\t" if name.endswith("tsv") else ",")
    content = path.read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    options = {"sep": "\t"} if name.endswith("tsv") else {}
    assert captions(hub(path, options, streaming=streaming)) == KEPT


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_json(hub, tmp_path, name, streaming):
    rows = records()
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (tmp_path / name).write_text(lines)
    assert captions(hub(tmp_path / name, streaming=streaming)) == KEPT


def test_what_is_refused(hub, tmp_path):
    path = write_csv(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"--split: someone/pairs has no split 'test'.* train$"):
        hub(path, split="test")
    with pytest.raises(UserError, match=r"--dataset_name: .* options of its own \(skiprows\)"):
        hub(path, {"skiprows": 1})
    path.write_text("caption,image_0,image_1,label_0\na,0.png,1.png\n")
    with pytest.raises(UserError, match=r"train\.csv, line 2: 3 cells"):
        hub(path)

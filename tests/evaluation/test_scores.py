"""Score files: read back, and only as far as prompt and image bytes are still the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.evaluation.generate.manifest import read_manifest, write_manifest
from sdpo.evaluation.score.table import json_path, parquet_path, read_scores


@pytest.fixture
def table(tmp_path):
    """Four images, two of them with equal bytes, scored by one scorer in full, by one in part."""
    (tmp_path / "m").mkdir()
    for i, shade in enumerate((0, 50, 100, 50)):
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / "m" / f"{i}.png")
    path = tmp_path / "m.json"
    write_manifest(path, [(f"p {i}", f"m/{i}.png", {}) for i in range(4)])
    table = read_scores(read_manifest(path))
    assert table.columns == {}
    table.put("full", np.arange(4), np.array([0.1, 0.2, 0.3, 0.4]))
    table.put("part", np.array([1, 2]), np.array([5.0, 6.0]))
    table.about = {"full": {"label": "Full", "weights": {}}, "part": {"label": "Part"}}
    table.save()
    return table


def test_round_trip(table):
    found = read_scores(table.manifest)
    assert found.columns["full"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert np.array_equal(found.columns["part"], [math.nan, 5, 6, math.nan], equal_nan=True)
    assert found.about == table.about
    assert found.missing("part").tolist() == [0, 3]
    assert found.missing("other").tolist() == [0, 1, 2, 3]
    assert found.complete() == ["full"]


def test_the_files_hold_scores(table):
    stored = pq.read_table(parquet_path(table.manifest.path))
    assert stored.column_names == ["prompt", "gen_image_path", "image_sha256", "full", "part"]
    assert stored["part"].to_pylist() == [None, 5.0, 6.0, None]
    written = json.loads(json_path(table.manifest.path).read_text())
    assert [row["full"] for row in written["scores"]] == [0.1, 0.2, 0.3, 0.4]
    assert written["scores"][1]["gen_image_path"] == "m/1.png"
    assert written["scorers"]["full"]["label"] == "Full"
    assert not list(table.manifest.path.parent.glob("*.tmp"))


def test_another_image_or_prompt_is_not_scored(table):
    path = table.manifest.path
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path.parent / "m" / "0.png")
    rows = json.loads(path.read_text())
    rows[2]["prompt"] = "another"
    path.write_text(json.dumps(rows))
    found = read_scores(read_manifest(path))
    assert found.missing("full").tolist() == [0, 2]
    assert found.columns["full"][[1, 3]].tolist() == [0.2, 0.4]


def test_rows_may_be_reordered_and_added(table):
    path = table.manifest.path
    rows = json.loads(path.read_text())
    extra = {**rows[0], "prompt": "new"}
    path.write_text(json.dumps([rows[3], extra, rows[0]]))
    found = read_scores(read_manifest(path))
    assert np.array_equal(found.columns["full"], [0.4, math.nan, 0.1], equal_nan=True)


def test_nothing_of_it_holds(table):
    path = table.manifest.path
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "prompt": "x"} for row in rows]))
    assert read_scores(read_manifest(path)).columns == {}


def test_a_foreign_file_is_not_overwritten(table):
    path = parquet_path(table.manifest.path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"is not a score file.*delete it"):
        read_scores(table.manifest)

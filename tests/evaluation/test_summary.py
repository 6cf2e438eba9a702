"""Means over suites and models."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdpo.evaluation.generate.manifest import read_manifest, write_manifest
from sdpo.evaluation.score.summary import ALL, grid, markdown, summarise
from sdpo.evaluation.score.table import read_scores


def scored(folder, suite, values):
    (folder / suite).mkdir(parents=True)
    for i in range(len(values)):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / suite / f"{i}.png")
    path = folder / f"{suite}.json"
    rows = [("p", f"{suite}/{i}.png", {"suite": suite}) for i in range(len(values))]
    write_manifest(path, rows)
    table = read_scores(read_manifest(path))
    table.put("clip", np.arange(len(values)), np.array(values))
    table.about["clip"] = {"label": "CLIP"}
    return table


def test_one_model_on_two_suites(tmp_path):
    tables = [scored(tmp_path, "a", [1.0, 2.0, 6.0]), scored(tmp_path, "b", [5.0])]
    rows = summarise(tables, ["clip"])
    assert [(r.suite, r.n) for r in rows] == [("a", 3), ("b", 1), (ALL, 4)]
    assert [r.mean for r in rows] == [3.0, 5.0, 3.5]
    assert rows[0].standard_error == pytest.approx((7 / 3) ** 0.5)
    assert rows[1].standard_error is None
    assert grid(rows) == [
        ["suite", "n", "CLIP"],
        ["a", "3", "3.0000 ± 1.5275"],
        ["b", "1", "5.0000"],
        [ALL, "4", "3.5000 ± 1.1902"],
    ]
    assert markdown(grid(rows)).splitlines()[1] == "|---|---|---|"


def test_two_models_on_one_suite(tmp_path):
    tables = [scored(tmp_path / m, "a", [v, v]) for m, v in (("one", 1.0), ("two", 2.0))]
    rows = summarise(tables, ["clip"])
    assert [(r.suite, r.mean) for r in rows] == [("one/a", 1.0), ("two/a", 2.0)]

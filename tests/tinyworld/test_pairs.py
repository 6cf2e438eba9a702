from __future__ import annotations

import io
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.tinyworld import oracle, pairs


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pairs.build_pairs(600, 0, tie_share=0.1)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_columns_are_those_of_pick_a_pic(table: pa.Table) -> None:
    assert set(table.column_names) == {
        *("jpg_0", "jpg_1", "label_0", "label_1", "caption", "model_0", "model_1"),
        *("image_0_uid", "image_1_uid", "are_different", "has_label", "ranking_id"),
    }
    assert table.schema == pairs.schema()
    assert table.schema.field("jpg_0").type == pa.binary()
    assert sum(column.null_count for column in table.columns) == 0


def test_labels_name_the_cleaner_or_more_faithful_image(table: pa.Table) -> None:
    for row in table.to_pylist():
        assert row["label_0"] + row["label_1"] == 1.0
        images = [decode(row["jpg_0"]), decode(row["jpg_1"])]
        assert all(image.shape == (64, 64, 3) for image in images)
        models = (row["model_0"], row["model_1"])
        if row["label_0"] == 0.5:
            assert models == (pairs.DEGRADED, pairs.DEGRADED)
            assert not np.array_equal(*images)
            continue
        winner = 0 if row["label_0"] == 1.0 else 1
        scores = [oracle.score(image, row["caption"]) for image in images]
        assert scores[winner].follows == 1.0
        assert scores[winner].score > scores[1 - winner].score
        assert models[winner] == pairs.CLEAN
        if models[1 - winner] == pairs.WRONG_ATTRIBUTE:
            assert scores[1 - winner].follows < 1.0
        else:
            assert models[1 - winner] == pairs.DEGRADED
            assert scores[1 - winner].clean < scores[winner].clean


def test_sides_kinds_and_ties_are_balanced(table: pa.Table) -> None:
    labels = Counter(table["label_0"].to_pylist())
    assert set(labels) == {0.0, 0.5, 1.0}
    assert 0.06 < labels[0.5] / 600 < 0.14
    assert 0.4 < labels[1.0] / (labels[0.0] + labels[1.0]) < 0.6
    models = Counter(table["model_0"].to_pylist() + table["model_1"].to_pylist())
    wrong = models[pairs.WRONG_ATTRIBUTE]
    assert 0.4 < wrong / (wrong + models[pairs.DEGRADED] - 2 * labels[0.5]) < 0.6


def test_ids_are_unique(table: pa.Table) -> None:
    uids = table["image_0_uid"].to_pylist() + table["image_1_uid"].to_pylist()
    assert len(set(uids)) == 1200
    assert table["ranking_id"].to_pylist() == list(range(600))


def test_the_seed_determines_the_table() -> None:
    first = pairs.build_pairs(20, 1)
    assert first.equals(pairs.build_pairs(20, 1))
    assert not first.equals(pairs.build_pairs(20, 2))


def test_difficulty_parameters_are_obeyed() -> None:
    degraded = pairs.build_pairs(40, 0, degraded_share=1.0, tie_share=0.0)
    assert set(degraded["label_0"].to_pylist()) == {0.0, 1.0}
    models = set(degraded["model_0"].to_pylist() + degraded["model_1"].to_pylist())
    assert models == {pairs.CLEAN, pairs.DEGRADED}

    def mean_distance(strength: float) -> float:
        rows = pairs.build_pairs(
            40, 0, degraded_share=1.0, tie_share=0.0, degradation_strength=strength
        ).to_pylist()
        distances = [
            np.abs(decode(r["jpg_0"]).astype(float) - decode(r["jpg_1"])).mean() for r in rows
        ]
        return float(np.mean(distances))

    assert mean_distance(0.5) < mean_distance(1.0) < mean_distance(2.0)


@pytest.mark.parametrize(
    "arguments",
    [{"n": -1}, {"tie_share": 1.5}, {"degraded_share": -0.1}, {"degradation_strength": -1.0}],
)
def test_bad_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        pairs.build_pairs(**({"n": 1, "seed": 0} | arguments))


def test_files_shards_and_disjoint_splits(tmp_path: Path) -> None:
    paths = pairs.write_pairs(tmp_path / "new", 50, 30, 5, shards=3)
    assert [path.name for path in paths] == [
        "train-00000-of-00003.parquet",
        "train-00001-of-00003.parquet",
        "train-00002-of-00003.parquet",
        "heldout-00000-of-00001.parquet",
    ]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    tables = [pq.read_table(path) for path in paths]
    assert [t.num_rows for t in tables] == [16, 17, 17, 30]
    ids = [i for t in tables for i in t["ranking_id"].to_pylist()]
    assert ids == list(range(80))
    # No image occurs twice: neither across shards nor in both splits.
    winners = [
        row["jpg_0"] if row["label_0"] == 1.0 else row["jpg_1"]
        for t in tables
        for row in t.to_pylist()
    ]
    assert len(set(winners)) == 80
    again = pairs.write_pairs(tmp_path / "again", 50, 30, 5, shards=3)
    assert [a.read_bytes() for a in again] == [p.read_bytes() for p in paths]


def test_an_empty_split_is_left_out(tmp_path: Path) -> None:
    assert [p.name for p in pairs.write_pairs(tmp_path, 0, 4, 0)] == [
        "heldout-00000-of-00001.parquet"
    ]


@pytest.mark.parametrize(("train", "shards"), [(4, 0), (4, 5), (-1, 1)])
def test_impossible_sizes_are_refused(tmp_path: Path, train: int, shards: int) -> None:
    with pytest.raises(ValueError, match="must"):
        pairs.write_pairs(tmp_path, train, 1, 0, shards=shards)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--train", "-1"),
        ("--heldout", "-1"),
        ("--shards", "0"),
        ("--tie_share", "2"),
        ("--degraded_share", "nan"),
        ("--degradation_strength", "-1"),
        ("--seed", "-1"),
    ],
)
def test_bad_flags_are_named(tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(UserError, match=flag):
        pairs.main(["--out", str(tmp_path), flag, value])


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        pairs.main(["--out", str(tmp_path / "file")])


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdpo.tinyworld.pairs", "--out", str(tmp_path)]
    bad = subprocess.run([*command, "--shards", "0"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "--shards must be from 1" in bad.stderr and "Traceback" not in bad.stderr
    good = subprocess.run(
        [*command, "--train", "8", "--heldout", "2"], capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    assert len(good.stdout.splitlines()) == 2
    assert pq.read_table(tmp_path / "train-00000-of-00001.parquet").num_rows == 8


def test_help_loads_no_heavy_modules() -> None:
    code = (
        "import sys; import sdpo.tinyworld.pairs, sdpo.tinyworld.architecture, "
        "sdpo.tinyworld.pretrain; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_building_is_fast() -> None:
    start = time.perf_counter()
    pairs.build_pairs(256, 0)
    # 4096 pairs in 30 s would be 7.3 ms a pair.
    assert (time.perf_counter() - start) / 256 < 0.0073

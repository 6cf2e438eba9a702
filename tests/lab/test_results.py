"""The long table against the files it is made of, and what is read out of it."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from sdpo.common.errors import UserError
from sdpo.lab.sweep.results import (
    collect,
    console_table,
    curves,
    final_means,
    label_of,
    read_results,
    summarise,
    timestep_bins,
    write_results,
)
from sdpo.lab.sweep.stages import image_dirs

from .sweep_tables import (
    BASE_SCORE,
    BETAS,
    MUS,
    SEEDS,
    planned,
    score,
    sweep_of,
    value,
    write_all,
    write_lines,
    write_summary,
)

BY = ("variant", "beta_dpo", "winner_preserving_mu")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sweep, its directory and its table."""
    out = tmp_path_factory.mktemp("sweep")
    sweep = write_all(out, planned())
    return sweep, out, read_results(write_results(sweep, out))


def test_a_row_for_each_number(written):
    sweep, _, table = written
    assert table.column_names == [
        *("run", "variant", "seed", "beta_dpo", "winner_preserving_mu"),
        *("kind", "step", "bin", "metric", "value"),
    ]
    for run in sweep.runs[::7]:
        at = (run.variant, *run.varied.values(), run.seed)
        rows = [row for row in table.to_pylist() if row["run"] == run.name]
        assert {tuple(row[c] for c in table.column_names[1:5]) for row in rows} == {
            (run.variant, run.seed, *run.varied.values())
        }
        found = {(r["kind"], r["step"], r["bin"], r["metric"]): r["value"] for r in rows}
        assert len(found) == len(rows)
        assert found["train", 3, None, "loss"] == 1.5
        assert math.isnan(found["train", 3, None, "grad_norm"])
        assert found["heldout", 0, None, "winner_drift_percent"] == value(*at, 0)
        assert found["heldout", 4, None, "loser_drift_percent"] == 2 * value(*at, 4)
        assert found["timestep", 4, 9, "winner_drift"] == value(*at, 4)
        assert found["timestep", 4, 9, "pairs"] == 4
        assert ("timestep", 4, 5, "winner_drift") not in found
        assert [found["score", step, None, "oracle"] for step in (0, 2, 4)] == [
            BASE_SCORE,
            score(run, 2),
            score(run, 4),
        ]
        # 4 steps of 3 numbers and of 10 + 3 x 2 by timestep, 3 checkpoints of 4, 3 scores.
        assert len(rows) == 4 * (3 + 16) + 3 * 4 + 3


def test_runs_without_bins_and_runs_that_are_not_done(tmp_path):
    runs = planned(("none",))[:3]
    sweep = write_all(tmp_path, runs, by_timestep=False)
    (tmp_path / "runs" / runs[1].name / "pipeline").rmdir()
    table = collect(sweep, tmp_path)
    assert set(table["run"].to_pylist()) == {runs[0].name, runs[2].name}
    assert "timestep" not in table["kind"].to_pylist()
    assert timestep_bins(table, "winner_drift", BY) == {}


def test_a_checkpoint_that_a_stop_left_gets_no_images(tmp_path):
    (run,) = runs = planned(("none",))[:1]
    sweep = write_all(tmp_path, runs)
    stopped = tmp_path / "runs" / run.name / "checkpoint-3"
    stopped.mkdir()
    (stopped / "state.json").write_text("{}")
    assert list(image_dirs(sweep, run, tmp_path)) == [0, 2, 4]
    assert list(image_dirs(replace(sweep, checkpoints="last"), run, tmp_path)) == [0, 4]


def test_no_run_is_done(tmp_path):
    sweep = sweep_of(planned())
    table = read_results(write_results(sweep, tmp_path))
    assert len(table) == 0
    assert curves(table, "heldout", "margin", ("variant",)) == {}
    assert summarise(table) == []
    assert console_table(table, BY) == []


def test_several_suites(tmp_path):
    runs = planned(("none",))[:1]
    sweep = write_all(tmp_path, runs)
    base = tmp_path / "images" / "base"
    base.rename(tmp_path / "old")
    write_summary(base, ("a", "clip", 0.1), ("b", "clip", 0.3), ("all suites", "clip", 0.25))
    rows = [
        r for r in collect(sweep, tmp_path).to_pylist() if (r["kind"], r["step"]) == ("score", 0)
    ]
    assert {r["metric"]: r["value"] for r in rows} == {"clip": 0.25, "a/clip": 0.1, "b/clip": 0.3}


def test_curves_group_runs(written):
    _, _, table = written
    found = curves(table, "heldout", "winner_drift_percent", BY)
    assert list(found)[:2] == [
        "none, beta_dpo 500, winner_preserving_mu 0.5",
        "none, beta_dpo 500, winner_preserving_mu 0.9",
    ]
    assert len(found) == 2 * len(BETAS) * len(MUS)
    group = found["pair, beta_dpo 5000, winner_preserving_mu 0.9"]
    assert group.steps.tolist() == [0, 2, 4]
    expected = [[value("pair", 5000.0, 0.9, seed, step) for step in (0, 2, 4)] for seed in SEEDS]
    np.testing.assert_allclose(group.values, expected)
    np.testing.assert_allclose(group.final, np.array(expected)[:, -1])
    means = final_means(table, "heldout", "winner_drift_percent", BY)
    assert means["pair", 5000.0, 0.9] == pytest.approx(statistics.mean(group.final))


def test_runs_of_unequal_length(tmp_path):
    runs = planned(("none",))[:2]
    sweep = write_all(tmp_path, runs)
    lines = [{"step": step, "margin": float(step)} for step in (0, 2)]
    write_lines(tmp_path / "runs" / runs[1].name / "heldout.jsonl", lines)
    (group,) = curves(collect(sweep, tmp_path), "heldout", "margin", ("variant",)).values()
    np.testing.assert_array_equal(group.values, [[0, -2, -4], [0, 2, np.nan]])
    assert group.final.tolist() == [-4, 2]


def test_a_run_that_ended_not_finite_does_not_pass_for_an_earlier_step(tmp_path):
    runs = planned(("none",))[:1]
    sweep = write_all(tmp_path, runs)
    lines = [{"step": 0, "margin": 0.0}, {"step": 4, "margin": None}]
    write_lines(tmp_path / "runs" / runs[0].name / "heldout.jsonl", lines)
    (group,) = curves(collect(sweep, tmp_path), "heldout", "margin", ("variant",)).values()
    assert np.isnan(group.final).all()


def test_bins_are_means_over_the_pairs_of_the_last_half(written):
    _, _, table = written
    found = timestep_bins(table, "winner_drift", BY)["none, beta_dpo 500, winner_preserving_mu 0.5"]
    assert found.shape == (len(SEEDS), 10)
    for row, seed in zip(found, SEEDS, strict=True):
        # Steps 3 and 4, with 3 and 4 pairs in the last bin and one in the first.
        last = [value("none", 500.0, 0.5, seed, step) for step in (3, 3, 3, 4, 4, 4, 4)]
        assert row[9] == pytest.approx(statistics.mean(last))
        assert row[0] == pytest.approx(0.035)
        assert np.isnan(row[1:9]).all()


def test_summary_against_scipy(written):
    sweep, _, table = written
    rows = summarise(table, BY)
    assert [row["group"] for row in rows] == list(curves(table, "train", "loss", BY))
    row = rows[-1]
    assert row["runs"] == 3
    at = ("pair", 5000.0, 0.9)
    drift = [value(*at, seed, 4) for seed in SEEDS]
    scores = [score(run, 4) for run in sweep.runs[-3:]]
    for metric, values in (("winner_drift_percent", drift), ("oracle", scores)):
        found = row[metric]
        assert found["mean"] == pytest.approx(statistics.mean(values))
        error = scipy.stats.sem(values)
        expected = scipy.stats.t.interval(0.95, 2, statistics.mean(values), error)
        assert found["interval"] == pytest.approx(expected, rel=1e-6)
        assert found["n"] == 3
    # The mean over all four steps, the same in every run.
    assert row["loser_scale"]["mean"] == pytest.approx(0.25)
    assert row["implicit_acc"]["mean"] == pytest.approx(0.4)


def test_the_consoles_table_is_of_means_over_seeds(written):
    _, _, table = written
    head, *lines = console_table(table, BY)
    assert head.split("  ")[0] == "mean over seeds" and head.endswith("oracle")
    assert len(lines) == 2 * len(BETAS) * len(MUS) and {len(line) for line in lines} == {len(head)}
    drift = statistics.mean(value("pair", 5000.0, 0.9, seed, 4) for seed in SEEDS)
    shown = f"{drift:+.1f} {2 * drift:+.1f} 0.40 0.250 {0.5 + 0.01 * drift:.3f}"
    assert lines[-1].startswith("pair, beta_dpo 5000, winner_preserving_mu 0.9 ")
    assert lines[-1].split()[-6:] == ["3", *shown.split()]


def test_the_consoles_table_without_held_out_pairs_and_images(tmp_path):
    runs = planned(("none",))[:1]
    write_all(tmp_path, runs)
    (tmp_path / "runs" / runs[0].name / "heldout.jsonl").unlink()
    sweep = replace(sweep_of(runs), heldout=None, images=None)
    head, line = console_table(collect(sweep, tmp_path), ("variant",))
    assert head.split()[-1] == "scale" and line.split() == ["none", "1", "-", "-", "-", "0.250"]


def test_labels():
    assert label_of({"variant": "batch"}) == "batch"
    assert label_of({"beta_dpo": 5000.0, "use_ema": True}) == "beta_dpo 5000, use_ema True"


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*none\.parquet"):
        read_results(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(UserError, match=r"text\.parquet cannot be read"):
        read_results(tmp_path / "text.parquet")
    import pyarrow as pa

    pq.write_table(pa.table({"run": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="it has no column variant"):
        read_results(tmp_path / "other.parquet")

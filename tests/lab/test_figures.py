"""A sweep's figures show the numbers of its table."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sdpo.evaluation.generate.manifest import write_manifest
from sdpo.lab.sweep import figures
from sdpo.lab.sweep.results import collect

from .sweep_tables import (
    BASE_SCORE,
    BETAS,
    MUS,
    SEEDS,
    planned,
    score,
    value,
    write_all,
    write_lines,
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep, its directory and its table."""
    out = tmp_path_factory.mktemp("sweep")
    found = write_all(out, planned())
    return found, out, collect(found, out)


def drawn(path):
    """Whether there is a picture with something on it."""
    with Image.open(path) as image:
        assert image.width > 300
        return len(image.convert("RGB").getcolors(1 << 24)) > 10


def lines(axis):
    """Data of the labelled lines."""
    return {
        line.get_label(): (line.get_xdata(), line.get_ydata())
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def band(axis, number=0):
    """Lowest and highest value of a band at the last step."""
    points = axis.collections[number].get_paths()[0].vertices
    last = points[points[:, 0] == points[:, 0].max()]
    return last[:, 1].min(), last[:, 1].max()


def test_drift(sweep, tmp_path):
    _, _, table = sweep
    by = ("variant", "beta_dpo", "winner_preserving_mu")
    figure = figures.draw_drift(table, tmp_path / "drift.png", by)
    assert drawn(tmp_path / "drift.png")
    winner, loser, margin = figure.axes
    label = "none, beta_dpo 500, winner_preserving_mu 0.5"
    values = [[value("none", 500.0, 0.5, seed, step) for step in (0, 2, 4)] for seed in SEEDS]
    steps, mean = lines(winner)[label]
    assert list(steps) == [0, 2, 4]
    np.testing.assert_allclose(mean, np.mean(values, axis=0))
    np.testing.assert_allclose(lines(loser)[label][1], 2 * np.mean(values, axis=0))
    np.testing.assert_allclose(lines(margin)[label][1], [0, -2, -4])
    assert band(winner) == pytest.approx((min(values)[-1], max(values)[-1]))
    assert len(lines(winner)) == 8
    assert "band: least to largest" in figure.get_suptitle()


def test_lines_are_drawn_where_all_runs_of_a_group_were_measured(tmp_path):
    runs = planned(("none",))[:2]
    found = write_all(tmp_path, runs)
    lines_of = [{"step": s, "winner_drift_percent": float(s)} for s in (0, 2, 3, 4)]
    write_lines(tmp_path / "runs" / runs[0].name / "heldout.jsonl", lines_of)
    figure = figures.draw_drift(collect(found, tmp_path), tmp_path / "drift.png")
    assert list(lines(figure.axes[0])["none"][0]) == [0, 2, 4]


def test_scale_and_bins(sweep, tmp_path):
    _, _, table = sweep
    figure = figures.draw_scale(table, tmp_path / "scale.png")
    assert drawn(tmp_path / "scale.png")
    scale, by_bin, drift = figure.axes
    # 0.1, 0.2, ...: the mean of all so far.
    np.testing.assert_allclose(lines(scale)["pair"][1], [0.1, 0.15, 0.2, 0.25])
    at, values = lines(by_bin)["pair"]
    np.testing.assert_allclose(at, [0.05, 0.95])
    np.testing.assert_allclose(values, [0.5, (3 * 0.3 + 4 * 0.4) / 7])
    assert len(lines(drift)) == 2


def test_scale_without_bins(tmp_path):
    found = write_all(tmp_path, planned(("none",)), by_timestep=False)
    figure = figures.draw_scale(collect(found, tmp_path), tmp_path / "scale.png")
    assert len(figure.axes) == 1


def test_map(sweep, tmp_path):
    found, _, table = sweep
    figure = figures.draw_map(table, tmp_path / "map.png", scorer="oracle")
    assert drawn(tmp_path / "map.png")
    maps = [axis for axis in figure.axes if axis.get_xlabel() == "beta_dpo"]
    assert len(maps) == 4
    assert [m.get_title().split(":")[0] for m in maps] == ["none", "none", "pair", "pair"]
    drift, scores = maps[2], maps[3]
    assert [t.get_text() for t in drift.get_xticklabels()] == ["500", "5000"]
    assert [t.get_text() for t in drift.get_yticklabels()] == ["0.5", "0.9"]
    expected = [
        [np.mean([value("pair", beta, mu, seed, 4) for seed in SEEDS]) for beta in BETAS]
        for mu in MUS
    ]
    np.testing.assert_allclose(drift.images[0].get_array(), expected)
    assert [t.get_text() for t in drift.texts] == [f"{v:+.1f}" for row in expected for v in row]
    low, high = drift.images[0].get_clim()
    assert low == -high
    means = {}
    for run in found.runs:
        key = (run.variant, *run.varied.values())
        means.setdefault(key, []).append(score(run, 4))
    expected = [[np.mean(means["pair", beta, mu]) for beta in BETAS] for mu in MUS]
    np.testing.assert_allclose(scores.images[0].get_array(), expected)
    assert np.mean(scores.images[0].get_clim()) == pytest.approx(BASE_SCORE)
    assert f"(start: {BASE_SCORE:.3f})" in scores.get_title()


def test_map_with_a_cell_missing(tmp_path):
    runs = [r for r in planned(("none",)) if list(r.varied.values()) != [500.0, 0.9]]
    figure = figures.draw_map(collect(write_all(tmp_path, runs), tmp_path), tmp_path / "map.png")
    assert [t.get_text() for t in figure.axes[0].texts][2] == "-"


def test_horizon(sweep, tmp_path):
    found, _, table = sweep
    figure = figures.draw_horizon(table, tmp_path / "horizon.png", ["oracle"])
    assert drawn(tmp_path / "horizon.png")
    drift, scores = figure.axes
    assert list(lines(drift)) == ["none", "pair"]
    steps, mean = lines(scores)["none"]
    assert list(steps) == [0, 2, 4]
    runs = [run for run in found.runs if run.variant == "none"]
    np.testing.assert_allclose(
        mean, [BASE_SCORE, *(np.mean([score(run, step) for run in runs]) for step in (2, 4))]
    )
    assert [line.get_ydata()[0] for line in scores.get_lines() if line.get_linestyle() == ":"] == [
        BASE_SCORE
    ]


def manifest(directory, shade):
    """Two prompts and their images, all of one grey."""
    (directory / "m").mkdir(parents=True)
    rows = []
    for i in range(2):
        Image.new("RGB", (8, 8), (shade + i,) * 3).save(directory / "m" / f"{i}.png")
        rows.append((f"prompt {i}", f"m/{i}.png", {}))
    write_manifest(directory / "m.json", rows)
    return directory / "m.json"


def test_strips(tmp_path):
    base = manifest(tmp_path / "base", 0)
    rows = {
        "none": {0: base, 4: manifest(tmp_path / "none", 40)},
        "pair": {0: base, 2: manifest(tmp_path / "pair2", 80), 4: manifest(tmp_path / "pair", 90)},
    }
    figure = figures.draw_strips(rows, tmp_path / "strips.png", prompts=(1, 0))
    assert drawn(tmp_path / "strips.png")
    shades = [
        round(255 * float(axis.images[0].get_array().mean())) if axis.images else None
        for axis in figure.axes
    ]
    # Rows: each prompt for each variant; columns: steps 0, 2 and 4.
    assert shades == [1, None, 41, 1, 81, 91, 0, None, 40, 0, 80, 90]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["step 0", "step 2", "step 4"]
    assert "prompt 1" in figure.axes[0].get_ylabel()
    assert "pair" in figure.axes[3].get_ylabel()


def test_a_sweep_gets_the_figures_that_fit_it(tmp_path):
    from dataclasses import replace

    from sdpo.lab.sweep.results import write_results

    found = write_all(tmp_path, planned())
    write_results(found, tmp_path)
    names = [path.name for path in figures.draw(found, tmp_path)]
    assert names == ["scale.png", "drift.png", "map_oracle.png", "horizon.png"]
    plain = replace(found, images=None, image_config=None, grid=("beta_dpo",))
    assert [path.name for path in figures.draw(plain, tmp_path)] == ["scale.png", "drift.png"]
    bare = replace(plain, heldout=None)
    assert [path.name for path in figures.draw(bare, tmp_path)] == ["scale.png"]
    no_scores = replace(found, images=None, image_config=None)
    assert [path.name for path in figures.draw(no_scores, tmp_path)][-1] == "map.png"

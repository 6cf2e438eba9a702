"""Curves of runs side by side, and what is said of runs that cannot be drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from e2e.harness import run_here
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.lab import plot


def write(directory, scale, bins=False, steps=6):
    """A run's metrics.jsonl whose numbers are known; the last line is being written."""
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": scale * step, "winner_drift": -scale, "grad_norm": None}
        if bins:
            scales = [None if i == step else i / 10 for i in range(10)]
            entry["by_timestep"] = {"pairs": [1] * 10, "loser_scale": scales}
        lines.append(json.dumps(entry))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "lo')
    return directory


@pytest.fixture
def runs(tmp_path):
    """Two runs of one name, and one that logged its scale by timestep."""
    found = [write(tmp_path / "a" / "run", 1.0), write(tmp_path / "b" / "run", 2.0)]
    return [*found, write(tmp_path / "c" / "bins", 3.0, bins=True)]


def figure_of(paths, metrics, window, path):
    return plot.draw(plot.read_runs(paths), metrics, window, path)


def test_curves(runs, tmp_path):
    figure = figure_of(runs, ["loss", "winner_drift"], 1, tmp_path / "c.png")
    loss, drift, strip = figure.axes[:3]
    assert [axis.get_title() for axis in (loss, drift)] == ["loss", "winner_drift"]
    assert [line.get_label() for line in loss.get_lines()] == ["a/run", "b/run", "c/bins"]
    np.testing.assert_array_equal(loss.get_lines()[1].get_xdata(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(loss.get_lines()[1].get_ydata(), [2, 4, 6, 8, 10, 12])
    # The drift has a line at 0 too.
    assert len(drift.get_lines()) == 4
    values = strip.collections[0].get_array()
    assert values.shape == (10, 6)
    assert values[4, 0] == 0.4
    assert np.ma.getmaskarray(np.ma.masked_invalid(values))[1, 0]
    assert "c/bins" in strip.get_title()


def test_smoothed_curves_have_the_steps_behind_them(runs, tmp_path):
    figure = figure_of(runs[:1], ["loss"], 3, tmp_path / "c.png")
    raw, smooth = figure.axes[0].get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(smooth.get_ydata(), [1, 1.5, 2, 3, 4, 5])
    assert "last 3 steps" in figure.get_suptitle()


def test_what_a_run_did_not_log_or_was_not_finite(runs, tmp_path):
    lines = [
        json.dumps({"step": s, "loss": v, "lr": 0.1}) for s, v in ((1, 1.0), (2, None), (3, 3.0))
    ]
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines))
    figure = figure_of(runs[:2], ["loss", "lr"], 1, tmp_path / "c.png")
    loss, lr = figure.axes
    np.testing.assert_array_equal(loss.get_lines()[0].get_ydata(), [1, np.nan, 3])
    assert [line.get_label() for line in lr.get_lines()] == ["a/run"]


def test_program(runs, tmp_path, capsys):
    out = tmp_path / "curves.png"
    assert run_here("sdpo/lab/plot.py", [*runs, "--out", out, "--metrics", "loss, grad_norm"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.width > 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    # Not all default panels are in these runs; those that are get drawn.
    assert run_here("sdpo/lab/plot.py", [runs[0], "--out", out]) == 0


def test_labels_are_as_short_as_they_can_be(tmp_path):
    assert plot.labels_of([tmp_path / "x" / "one", tmp_path / "x" / "two"]) == ["one", "two"]
    named = plot.labels_of([tmp_path / "a" / "r", tmp_path / "b" / "r", tmp_path / "a" / "s"])
    assert named == ["a/r", "b/r", "a/s"]


def test_mistakes(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1')
    for arguments, sentence in (
        ([tmp_path / "none"], r"none is not a run: it has no metrics\.jsonl"),
        ([tmp_path / "empty"], r"empty is not a run"),
        ([tmp_path / "new"], r"new/metrics\.jsonl holds no whole line"),
        ([runs[0], tmp_path / "a" / ".." / "a" / "run"], "a run is given twice"),
        ([runs[0], "--metrics", "loss,los"], "--metrics: no run logged los; there are: step, loss"),
        ([runs[2], "--metrics", "by_timestep"], "--metrics: no run logged by_timestep"),
        ([runs[0], "--metrics", ","], "--metrics: give at least one"),
        ([runs[0], "--smooth", "0"], "--smooth must be at least 1"),
        ([runs[0], "--out", tmp_path / "none" / "x.png"], "--out: .* in a directory that exists"),
        ([runs[0], "--out", tmp_path], "--out: .* must be a file"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_here("sdpo/lab/plot.py", ["--out", tmp_path / "x.png", *arguments])
    assert not (tmp_path / "x.png").exists()

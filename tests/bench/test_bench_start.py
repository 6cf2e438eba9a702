"""start.py at its smallest."""

from __future__ import annotations

import json

from e2e.harness import run_here

from scripts.bench import common, start
from sdpo.common.cli import as_argv


def test_growth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "time_start", lambda work: {"import torch": 1.0})
    out = tmp_path / "x.json"
    argv = ["--rows", 100, 200, "--steps", 3, "--pairs", 4, "--out", out]
    assert run_here("scripts/bench/start.py", argv) == 0
    found = json.loads(out.read_text())
    assert found["phases"] == {"import torch": 1.0}
    assert found["rows"].keys() == {"100", "200"} and found["metrics_steps"].keys() == {"3"}
    assert found["rows"]["100"].keys() == {
        *("open, first time", "open again", "describe", "an epoch's order", "go on by row"),
        *("go on by stream, no file counted yet", "go on by stream"),
    }
    assert all(seconds > 0 for seconds in found["rows"]["200"].values())
    reports = found["reports"]["4"]
    assert reports.keys() >= {"compare.py, whole", "align, resample", "page, MB"}
    assert ("browser: usable" in reports) == ("is not opened" not in capsys.readouterr().out)
    assert all(figure > 0 for figure in reports.values())


def test_phases_end_with_a_step(tmp_path, pairs_dir, tiny_sd15):
    flags = {"pretrained_model_name_or_path": tiny_sd15, "train_data_dir": pairs_dir}
    flags = common.run_flags(tmp_path, "run", **flags, resolution=32)
    found = start.phases(as_argv(flags))
    assert list(found)[-2:] == ["first step", "second step"]
    assert min(found.values()) >= 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2

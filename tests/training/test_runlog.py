"""metrics.jsonl, config.json, and writing files whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sdpo.common import files
from sdpo.common.jsonl import read_lines
from sdpo.training.runlog import RunLog, describe_run, peak_memory_gib, write_config


def entries(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_there_as_soon_as_written(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5 * step})
        assert entries(tmp_path)[-1] == {"step": step, "loss": 0.5 * step}
    log.close()
    assert len(entries(tmp_path)) == 2


def test_what_is_not_finite_becomes_null(tmp_path):
    log = RunLog(tmp_path, 0)
    nested = {"e": {"f": [float("nan"), 2, None]}}
    log.write(
        {"step": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.5, **nested}
    )
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    want = {"step": 1, "a": None, "b": None, "c": None, "d": 1.5, "e": {"f": [None, 2, None]}}
    assert json.loads(text, parse_constant=pytest.fail) == want


def test_resuming_drops_later_steps_and_a_line_cut_off(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "lo']))
    log = RunLog(tmp_path, 3)
    log.write({"step": 4, "loss": 9.0})
    log.close()
    want = [{"step": s, "loss": s / 2} for s in (1, 2, 3)] + [{"step": 4, "loss": 9.0}]
    assert entries(tmp_path) == want


def test_resuming_leaves_the_lines_as_they_are(tmp_path):
    lines = '{"step": 1,  "x":1.50}\n{"step": 2, "x": 1e-05}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    RunLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_fresh_run_forgets_an_older_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    RunLog(tmp_path, 0).close()
    assert entries(tmp_path) == []


def test_reading_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1, "x": null}\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1, "x": None}, {"step": 2}]


def test_config_holds_flags_versions_and_revision(make_config, tmp_path):
    settings = make_config(beta_dpo=123.0)
    write_config(tmp_path, describe_run(settings, {"pairs": 5}))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["args"]["beta_dpo"] == 123.0
    assert set(config["args"]) == set(settings.flags())
    assert config["resolved"] == {"pairs": 5}
    assert config["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "git_revision" in config
    assert config["command"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc on this system")
def test_peak_memory_is_that_of_the_process():
    status = Path("/proc/self/status").read_text()
    kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=0.05)


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_kill_while_writing_keeps_the_old_file(tmp_path, monkeypatch, stage):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, stage, killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": "x" * 10000})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"old": True}
    files.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"new": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

"""What `bash scripts/lab.sh` starts, in which order; the programs themselves are tested apart."""

from __future__ import annotations

import json
import sys

import pytest

from sdpo.common.errors import UserError
from sdpo.lab.audit.config import parse_config as parse_audit
from sdpo.lab.sweep.file import read_sweep
from sdpo.lab.tiny import run as tiny

SWEEP = """
name: {name}
flags:
  pretrained_model_name_or_path: {model}
  train_data_dir: {pairs}
  resolution: 64
  max_train_steps: 4
variants:
  none: {{}}
  batch: {{use_winner_preserving: true}}
seeds: [3, 4]
"""


@pytest.fixture
def sweeps(tiny_sd15, tmp_path):
    """A directory of two sweeps, whose pairs the lab has yet to write."""
    directory = tmp_path / "sweeps"
    directory.mkdir()
    for file, name in (("1-b.yaml", "treatments"), ("2-a.yaml", "another")):
        text = SWEEP.format(name=name, model=tiny_sd15, pairs=tmp_path / "out" / "pairs")
        (directory / file).write_text(text)
    return directory


def checkpoints(out):
    """As training would leave them."""
    for step in (2, 4):
        path = out / "treatments" / "runs" / "none_seed-3" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")


def argv(sweeps, tmp_path, *more):
    return ["--out", str(tmp_path / "out"), "--sweeps", str(sweeps), "--pairs", "8", *more]


def test_sweeps_then_audits_then_the_page(sweeps, tmp_path, monkeypatch):
    out, started = tmp_path / "out", []

    def run(commands, env=None):
        started.extend(commands.items())
        if "another" in commands:
            checkpoints(out)

    monkeypatch.setattr(tiny, "run_together", run)
    monkeypatch.setattr(tiny, "run_step", lambda command, name: run({name: command}))
    monkeypatch.setattr("sdpo.lab.tiny.report.write", lambda *args: started.append(args))
    assert tiny.main(argv(sweeps, tmp_path, "--heldout", "4", "--audit_steps", "5")) == 0
    with pytest.raises(UserError, match=r"^--out: \S+1-b.yaml trains on .*, and the pairs are in"):
        tiny.main([*argv(sweeps, tmp_path), "--out", str(tmp_path / "elsewhere")])
    *programs, page = started
    names = [name for name, _ in programs]
    assert names[:2] == ["treatments", "another"]
    assert sorted(names[2:]) == ["audit-start", "audit-without"]
    assert programs[0][1] == [
        *(sys.executable, "-m", "sdpo.lab", "sweep", str(sweeps / "1-b.yaml")),
        *("--out", str(out / "treatments")),
    ]
    # The audits are of what was trained, by its own flags.
    found = {name: parse_audit(command[4:]) for name, command in programs[2:]}
    runs = out / "treatments" / "runs"
    assert found["audit-start"].audit.checkpoint is None
    assert found["audit-without"].audit.checkpoint == str(runs / "none_seed-3" / "checkpoint-2")
    assert not any(f.safeguard.use_winner_preserving for f in found.values())
    assert {f.audit.steps for f in found.values()} == {5}
    assert {f.run.seed for f in found.values()} == {3}
    assert found["audit-start"].audit.fixed_scales == (0.5, 0.75)
    assert page[0] == out
    assert [sweep.name for _, sweep in page[1]] == ["treatments", "another"]
    assert set(page[2]) == set(found)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--pairs", "0"], "--pairs must be at least 1"),
        (["--audit_steps", "0"], "--audit_steps must be at least 1"),
        (["--sweeps", "nowhere"], r"--sweeps: nowhere holds no \*.yaml"),
        (["--out", __file__], "--out: .* is not a directory"),
    ],
)
def test_bad_flags(sweeps, tmp_path, more, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny.parse_config(argv(sweeps, tmp_path, *more))
    assert not (tmp_path / "out").exists()


def test_the_shipped_sweeps_are_sound(repo, monkeypatch, tmp_path, pairs_dir):
    """Every run's flags pass train.py's own checks, in the place where the script runs them."""
    files = sorted((repo / "scripts" / "lab").glob("*.yaml"))
    names = [
        "1-treatments",
        "2-dmpo",
        "3-dspo",
        "4-map",
        "5-horizon",
        "6-flow",
        "7-flow-map",
        "8-losers",
    ]
    assert [f.stem for f in files] == names
    for file in files:
        moved = tmp_path / file.name
        text = file.read_text().replace("output/lab/pairs", str(pairs_dir))
        moved.write_text(text.replace("assets/", f"{repo}/assets/"))
        sweep = read_sweep(moved)
        assert sweep.name == file.stem.split("-", 1)[1]
        json.dumps([run.flags for run in sweep.runs])
    assert len(read_sweep(tmp_path / "4-map.yaml").runs) == 9

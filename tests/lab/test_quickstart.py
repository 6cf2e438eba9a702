"""scripts/quickstart.sh, a few steps long."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest
from PIL import Image

TINY = ["--steps", "3", "--batch", "4", "--pairs", "24", "--heldout", "8", "--prompts", "5"]


def bash(repo, script, *arguments):
    env = {**os.environ, "SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1"}
    command = ["bash", f"scripts/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=280)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def quickstart(repo, tmp_path_factory):
    """The console's text and the directory of one short quickstart."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = bash(repo, "quickstart.sh", *TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_both_runs_are_the_same_but_for_the_safeguard(quickstart):
    _, out = quickstart
    plain, guarded = (
        json.loads((out / name / "config.json").read_text())["args"]
        for name in ("plain", "safeguard")
    )
    different = {name for name in plain if plain[name] != guarded[name]}
    assert different == {"output_dir", "use_winner_preserving"}
    assert (plain["use_winner_preserving"], guarded["use_winner_preserving"]) == (False, True)
    first, held = (lines(out / name / "metrics.jsonl")[0] for name in ("plain", "safeguard"))
    # Before the first update both see the same pairs, noise and timesteps.
    assert first["winner_mse"] == held["winner_mse"]
    assert first["loser_scale"] == 1
    assert 0 < held["loser_scale"] < 1


def test_on_the_tiny_sd3(repo, tmp_path):
    out = tmp_path / "out"
    tiny = ["--steps", "2", "--batch", "2", "--pairs", "8", "--heldout", "4", "--prompts", "2"]
    done = bash(repo, "quickstart.sh", *tiny, "--base", "sd3", "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "safeguard" / "config.json").read_text())
    assert found["resolved"]["family"] == "sd3"
    assert found["args"]["winner_preserving_scope"] == "pair"
    assert 0 < lines(out / "safeguard" / "metrics.jsonl")[0]["loser_scale"] < 1
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["base", "plain", "safeguard"]
    assert (out / "compare" / "report.html").is_file()


def test_the_console_says_which_of_the_stages_runs(quickstart):
    text, _ = quickstart
    lines = text.splitlines()
    assert lines[0].startswith("5 stages: training without the safeguard; ")
    begun = [line for line in lines if line[1:3] == "/5"]
    assert [line[0] for line in begun] == list("12345")
    assert begun[1] == "2/5 training with the safeguard"
    assert "oracle: how well an image follows its caption and how clean it is, 0 to 1" in lines


def test_summary_says_what_was_measured(quickstart):
    text, out = quickstart
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["model"]: row for row in summary["rows"]}
    assert list(rows) == ["base", "plain", "safeguard"]
    for name in ("plain", "safeguard"):
        heldout = lines(out / name / "heldout.jsonl")
        assert [entry["step"] for entry in heldout] == [0, 1, 2, 3]
        assert heldout[-1]["pairs"] <= 8
        for key in ("winner_drift_percent", "loser_drift_percent", "implicit_acc"):
            assert rows[name][key] == heldout[-1][key]
        assert f"{rows[name]['winner_drift_percent']:+.1f} %" in text
        assert f"{rows[name]['oracle']:.3f}" in text
    for name, row in rows.items():
        (path,) = (out / "eval" / name).glob("*_scores.json")
        scores = [image["oracle"] for image in json.loads(path.read_text())["scores"]]
        assert len(scores) == 5
        assert row["oracle"] == pytest.approx(statistics.mean(scores))
        assert row["oracle_se"] == pytest.approx(statistics.stdev(scores) / 5**0.5)


def test_models_are_compared_on_the_same_prompts_and_noises(quickstart):
    text, out = quickstart
    report = (out / "compare" / "report.html").read_text()
    for word in ("base", "without safeguard", "with safeguard", "a red circle"):
        assert word in report
    manifests = [
        json.loads(next((out / "eval" / name).glob("*_diffusers.json")).read_text())
        for name in ("base", "plain", "safeguard")
    ]
    assert len({json.dumps([row["prompt"] for row in m]) for m in manifests}) == 1
    assert len({json.dumps([row["metadata"]["seed"] for row in m]) for m in manifests}) == 1
    assert len({m[0]["metadata"]["unet_sha256"] for m in manifests}) == 3
    assert json.loads((out / "eval" / "summary.json").read_text())["rows"][0]["scorer"] == "oracle"
    pair = json.loads((out / "compare" / "without_safeguard_vs_base" / "summary.json").read_text())
    rows = json.loads((out / "summary.json").read_text())["rows"]
    rate = 100 * pair["metrics"][0]["win_rate_a_over_b"]
    assert rows[1]["wins_over_base_percent"] == pytest.approx(rate)
    assert f"{rate:.0f} %" in text


def test_pictures_and_the_line_that_says_where_they_are(quickstart):
    text, out = quickstart
    last = text.strip().splitlines()[-1]
    assert str(out / "compare" / "report.html") in last
    for name in ("curves.png", "samples.png"):
        assert str(out / name) in last
        with Image.open(out / name) as image:
            assert image.width > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert not list(out.glob("*.tmp"))


def test_the_same_command_again_changes_nothing(repo, quickstart):
    _, out = quickstart
    before = (out / "summary.json").read_text()
    weights = (out / "safeguard" / "checkpoint-3" / "unet.pth").stat().st_mtime_ns
    assert bash(repo, "quickstart.sh", *TINY, "--out", out).returncode == 0
    assert (out / "summary.json").read_text() == before
    assert (out / "safeguard" / "checkpoint-3" / "unet.pth").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "1"], "--seed 0"),
        (["--method", "dmpo"], "--method diffusion-dpo"),
        (["--pairs", "32"], "--pairs 24"),
        (["--batch", "0"], "--batch must be"),
        (["--pairs", "5"], "--pairs must be"),
        (["--learning_rate", "0"], "--learning_rate must be"),
        (["--learning_rate", "1e-3"], "--learning_rate 5e-05"),
        (["--method", "sft"], "--method"),
        (["--prompts", "129"], "--prompts"),
    ],
)
def test_mistakes(repo, quickstart, flags, said):
    _, out = quickstart
    before = (out / "flags.json").read_text()
    done = bash(repo, "quickstart.sh", *TINY, *flags, "--out", out)
    assert done.returncode == 2
    assert said in done.stderr.strip().splitlines()[-1]
    assert (out / "flags.json").read_text() == before

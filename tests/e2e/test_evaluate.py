"""Generation and scoring as a user starts them: the scripts, several processes, and kills."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sdpo.evaluation.score.scorers import PUBLISHED

from .harness import (
    Forked,
    free_port,
    generation_argv,
    last_sentence,
    program,
    rank_environments,
    run_here,
)

STEM = "suite_seed0_32x32_2s_7.5cfg"
COUNT = 12


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Twelve prompts."""
    path = tmp_path_factory.mktemp("suite") / "suite.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(COUNT)))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny random weights of all five, as flags."""
    from scripts.parity.small_scorers import write_all

    found = write_all(tmp_path_factory.mktemp("weights"))
    return ["--weights", *(f"{name}={path}" for name, path in found.items())]


@pytest.fixture(scope="module")
def flags(tiny_sd15, suite):
    """Flags of generate.py, in float32."""

    def make(out, *more):
        return generation_argv(tiny_sd15, suite, out, "--dtype", "fp32", *more)

    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """One uninterrupted generation in one process."""
    out = tmp_path_factory.mktemp("whole")
    assert run_here("eval/generate.py", flags(out)) == 0
    return out


def pixels(out):
    return np.stack(
        [np.asarray(Image.open(out / STEM / f"{i}_32x32.png")) for i in range(COUNT)]
    ).astype(int)


def same_but_for_rounding(a, b):
    return np.abs(pixels(a) - pixels(b)).max() <= 1


def test_killed_and_started_again(flags, whole, tmp_path):
    out = tmp_path / "out"
    slow = flags(out, "--batch_size", 1)
    fork = Forked(slow, tmp_path / "stderr", name="eval/generate.py")
    deadline = time.monotonic() + 120
    while len(list(out.rglob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    fork.kill()
    assert fork.wait() == -signal.SIGKILL
    there = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert 3 <= len(there) < COUNT
    assert not (out / f"{STEM}.json").exists()
    assert run_here("eval/generate.py", flags(out)) == 0
    assert {p: p.stat().st_mtime_ns for p in there} == there
    assert same_but_for_rounding(out, whole)
    assert (out / f"{STEM}.json").read_text() == (whole / f"{STEM}.json").read_text()


@pytest.fixture(scope="module")
def two(flags, weights, tmp_path_factory):
    """The same by evaluate.py in two processes, with two scorers."""
    out = tmp_path_factory.mktemp("two")
    argv = [*flags(out), "--scorers", "clip", "aesthetics", *weights, "--score_batch_size", 2]
    ranks = [
        Forked(argv, out.with_name(f"two-{i}"), environment, "eval/evaluate.py")
        for i, environment in enumerate(rank_environments(2))
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(r.stderr for r in ranks)
    return out


def test_two_processes_make_the_same_images(two, whole):
    assert same_but_for_rounding(two, whole)
    assert (two / f"{STEM}.json").read_text() == (whole / f"{STEM}.json").read_text()


def test_two_processes_score_alike(two, whole, weights):
    argv = [whole / f"{STEM}.json", "--scorers", "clip", "aesthetics", *weights]
    assert run_here("eval/score.py", argv) == 0
    for name in ("clip", "aesthetics"):
        one, other = (
            np.array(
                [row[name] for row in json.loads((d / f"{STEM}_scores.json").read_text())["scores"]]
            )
            for d in (whole, two)
        )
        # An image may differ by a level here and there.
        assert np.abs(one - other).max() < 1e-3 * max(1, np.ptp(one))
    assert len(json.loads((two / "summary.json").read_text())["rows"]) == 2


def test_two_processes_and_one_that_scores_beside_them(flags, weights, two, tmp_path):
    """Which scores every image: the two find nothing missing."""
    out = tmp_path / "out"
    argv = [*flags(out), "--scorers", "clip", "aesthetics", *weights, "--score_batch_size", 2]
    ranks = [
        Forked([*argv, "--score_beside"], tmp_path / f"stderr-{i}", own, "eval/evaluate.py")
        for i, own in enumerate(rank_environments(2))
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(r.stderr for r in ranks)
    said = "".join(rank.stderr for rank in ranks)
    assert "decoding" not in said and "ended early" not in said
    assert "images, 0 to come" in (out / "score_beside.log").read_text()
    tables = [json.loads((d / f"{STEM}_scores.json").read_text()) for d in (out, two)]
    assert tables[0]["scorers"] == tables[1]["scorers"]
    for name in ("clip", "aesthetics"):
        one, other = (
            np.array([{r["prompt"]: r[name] for r in t["scores"]}[f"prompt number {i}"]
                      for i in range(COUNT)])
            for t in tables
        )  # fmt: skip
        assert np.abs(one - other).max() < 1e-3 * max(1, np.ptp(one))


def test_scoring_beside_ends_with_what_started_it(flags, weights, tmp_path):
    import psutil

    argv = [*flags(tmp_path / "out"), "--scorers", "clip", *weights, "--score_beside"]
    fork = Forked(argv, tmp_path / "stderr", name="eval/evaluate.py")
    deadline = time.monotonic() + 120
    children = []
    while not (tmp_path / "out" / "score_beside.log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
        children = psutil.Process(fork.process.pid).children()
    assert children
    os.kill(fork.process.pid, signal.SIGKILL)
    assert fork.wait() == -signal.SIGKILL
    assert psutil.wait_procs(children, timeout=60)[1] == []


def script(name, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDPO_")}
    env |= {"SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1", **environment}
    return program("bash", f"scripts/eval/{name}.sh", *arguments, env=env)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_scripts(family, tiny_sd15, tiny_sdxl, suite, weights, tmp_path):
    """UNet in, five means out; SDXL in two processes, as the launcher starts them."""
    base = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}[family]
    out = tmp_path / "out"
    launch = {}
    if family == "sdxl":
        launch = {
            "SDPO_LAUNCH_ARGS": f"--multi_gpu --num_processes 2 --main_process_port {free_port()}",
            "ACCELERATE_USE_CPU": "true",
        }
    done = script(
        f"test_{family}",
        base / "unet" / "diffusion_pytorch_model.safetensors",
        *("--pretrained_model_name_or_path", base),
        *("--pretrained_vae_model_name_or_path", "base"),
        *("--suites", suite, "tinyworld", "--limit", 3),
        *("--resolution", 32, "--steps", 2, "--outdir", out),
        *weights,
        **launch,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [(r["suite"], r["scorer"], r["n"]) for r in rows] == [
        (suite_name, scorer, n)
        for scorer in PUBLISHED
        for suite_name, n in (("suite", 3), ("tinyworld", 3), ("all suites", 6))
    ]
    assert f"{rows[0]['mean']:.4f}" in done.stdout
    manifest = json.loads((out / f"{STEM}.json").read_text())
    assert manifest[0]["metadata"]["family"] == family
    assert manifest[0]["metadata"]["protocol"] == "paper"
    assert manifest[0]["metadata"]["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the UNet first"),
        (["--suites", "x"], "give the UNet first"),
        (["nowhere.pth"], "--unet: there is no file or directory nowhere.pth"),
        (["base", "--scorers", "mine"], "--scorers: there is no scorer 'mine'"),
        (["base", "--weights", "clip=/nowhere"], "--weights clip: there is no file"),
        (["base", "--suites", "nowhere.csv"], "nowhere.csv"),
        (["base", "--steps", "two"], "--steps"),
    ],
)
def test_mistakes_are_answered_once_and_at_once(arguments, said):
    done = script("test_sd15", *arguments, SDPO_LAUNCH_ARGS="--cpu --num_processes 2")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


def test_missing_weights_are_told_before_anything_is_generated(flags, tmp_path):
    out = tmp_path / "out"
    argv = [*flags(out), "--scorers", "hpsv2"]
    fork = Forked(argv, tmp_path / "stderr", name="eval/evaluate.py")
    assert fork.wait() == 2
    assert "--weights hpsv2=PATH" in last_sentence(fork.stderr, "evaluate.py")
    assert not out.exists()

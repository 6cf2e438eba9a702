"""Scoring: what is computed, what is not computed again, and what the summary says."""

from __future__ import annotations

import csv
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from e2e.harness import run_here
from PIL import Image

import sdpo.evaluation.score.scoring
from scripts.parity.small_scorers import write_all
from sdpo.common.errors import UserError
from sdpo.evaluation.generate.manifest import read_manifest, write_manifest
from sdpo.evaluation.score.checked_precision import CheckedPrecision
from sdpo.evaluation.score.config import ScoreOptions, ScorerConfig
from sdpo.evaluation.score.scorers import PUBLISHED
from sdpo.evaluation.score.scoring import score_manifests
from sdpo.evaluation.score.table import parquet_path, read_scores
from sdpo.tinyworld import world


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny random weights of all five."""
    return write_all(tmp_path_factory.mktemp("weights"))


def write_suite(folder, name, count, seed):
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    rows = []
    for i in range(count):
        scene = world.sample_scene(rng)
        world.render(scene).save(folder / name / f"{i}.png")
        rows.append((world.caption(scene), f"{name}/{i}.png", {"suite": name}))
    write_manifest(folder / f"{name}.json", rows)
    return folder / f"{name}.json"


@pytest.fixture
def manifests(tmp_path):
    """Two suites of images."""
    return [write_suite(tmp_path, "one", 5, 1), write_suite(tmp_path, "two", 3, 2)]


@pytest.fixture
def counted(monkeypatch):
    """What was decoded (file names) and scored (scorer to number of images)."""
    seen = {"decoded": [], "scored": {}, "loaded": []}
    opened, called = sdpo.evaluation.score.scoring.open_image, CheckedPrecision.__call__
    begin = CheckedPrecision.__init__

    def open_image(path):
        seen["decoded"].append(path)
        return opened(path)

    def call(self, views, prompts):
        seen["scored"][self.name] = seen["scored"].get(self.name, 0) + len(prompts)
        return called(self, views, prompts)

    def init(self, name, *rest):
        seen["loaded"].append(name)
        begin(self, name, *rest)

    monkeypatch.setattr(sdpo.evaluation.score.scoring, "open_image", open_image)
    monkeypatch.setattr(CheckedPrecision, "__call__", call)
    monkeypatch.setattr(CheckedPrecision, "__init__", init)
    return seen


def flags(weights):
    return ["--weights", *(f"{name}={path}" for name, path in weights.items())]


def test_the_program(manifests, weights, counted, tmp_path, capsys):
    out = tmp_path / "summary"
    argv = [*manifests, *flags(weights), "--batch_size", 4, "--outdir", out]
    assert run_here("eval/score.py", argv) == 0
    # Every image once, every scorer once.
    assert len(counted["decoded"]) == len(set(counted["decoded"])) == 8
    assert counted["loaded"] == list(PUBLISHED)
    assert counted["scored"] == dict.fromkeys(PUBLISHED, 8)

    tables = [read_scores(read_manifest(m)) for m in manifests]
    rows = {
        (r["suite"], r["scorer"]): r for r in json.loads((out / "summary.json").read_text())["rows"]
    }
    assert len(rows) == 15
    for name in PUBLISHED:
        one, two = (table.columns[name].tolist() for table in tables)
        for suite, values in (("one", one), ("two", two), ("all suites", one + two)):
            row = rows[suite, name]
            assert row["n"] == len(values)
            assert row["mean"] == pytest.approx(statistics.mean(values))
            error = statistics.stdev(values) / len(values) ** 0.5
            assert row["standard_error"] == pytest.approx(error)
    with open(out / "summary.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert {(r["suite"], r["scorer"]): float(r["mean"]) for r in listed} == {
        key: row["mean"] for key, row in rows.items()
    }
    console = capsys.readouterr().out
    table = (out / "summary.md").read_text()
    cell = f"{rows['one', 'pickscore']['mean']:.4f} ± "
    assert cell in console
    assert cell in table
    assert "| suite | n | PickScore | HPSv2 | Aesthetics | CLIP | ImageReward |" in table

    # Again: nothing to decode, nothing to load.
    for key in counted:
        counted[key].clear()
    assert run_here("eval/score.py", argv) == 0
    assert counted == {"decoded": [], "scored": {}, "loaded": []}
    assert capsys.readouterr().out == console


def score(manifests, names, weights, **options):
    read = [read_manifest(m) for m in manifests]
    return score_manifests(read, names, ScoreOptions(ScorerConfig(**options), weights, workers=1))


def test_only_what_is_missing(manifests, weights, counted):
    before = score(manifests, ["clip"], weights)[0].columns["clip"].copy()
    counted["decoded"].clear()
    counted["scored"].clear()
    Image.new("RGB", (64, 64), "red").save(manifests[0].parent / "one" / "2.png")
    tables = score(manifests, ["clip", "oracle"], weights)
    assert counted["scored"] == {"clip": 1, "oracle": 8}
    assert len(counted["decoded"]) == 8
    after = tables[0].columns["clip"]
    changed = np.flatnonzero(before != after)
    assert changed.tolist() == [2]


def test_other_weights_are_other_scores(manifests, weights, counted, tmp_path):
    score(manifests, ["clip"], weights)
    counted["scored"].clear()
    copy = tmp_path / "copy"
    shutil.copytree(weights["clip"], copy)
    score(manifests, ["clip"], {**weights, "clip": str(copy)})
    assert counted["scored"] == {"clip": 8}


def test_killed_in_the_middle(manifests, weights, counted, monkeypatch):
    """What was saved before the end is not scored again."""
    monkeypatch.setattr(sdpo.evaluation.score.scoring, "BATCHES_A_SAVE", 1)
    call = CheckedPrecision.__call__

    def until(self, views, prompts):
        if counted["scored"].get("clip", 0) >= 4:
            raise KeyboardInterrupt
        return call(self, views, prompts)

    with monkeypatch.context() as context:
        context.setattr(CheckedPrecision, "__call__", until)
        with pytest.raises(KeyboardInterrupt):
            score(manifests, ["clip"], weights, batch_size=2)
    assert len(read_scores(read_manifest(manifests[0])).missing("clip")) == 1
    counted["scored"].clear()
    tables = score(manifests, ["clip"], weights, batch_size=2)
    assert counted["scored"] == {"clip": 4}
    assert all(len(table.missing("clip")) == 0 for table in tables)
    shutil.rmtree(manifests[0].parent / "fresh", ignore_errors=True)
    parquet_path(manifests[0]).unlink()
    whole = score(manifests, ["clip"], weights)
    difference = whole[0].columns["clip"] - tables[0].columns["clip"]
    assert np.abs(difference).max() < 1e-6


def test_mixed_precision_is_checked(manifests, weights, capsys):
    """bfloat16 rounds away more than these scores differ by: float32 it is, and it is said."""
    exact = score(manifests, ["aesthetics"], weights)[0].columns["aesthetics"].copy()
    table = score(manifests, ["aesthetics"], weights, mixed_precision="bf16")[0]
    about = table.about["aesthetics"]
    assert 0 < about["float32_difference"] < 0.1
    if about["precision"] == "no":
        assert np.abs(table.columns["aesthetics"] - exact).max() < 1e-6
        assert "going on in float32" in capsys.readouterr().out
    else:
        spread = exact.std()
        assert about["float32_difference"] <= 0.02 * spread


def test_float32_that_took_over_is_not_scored_again(manifests, weights, counted, monkeypatch):
    monkeypatch.setattr("sdpo.evaluation.score.checked_precision.TOLERANCE", 0.0)
    (one, _) = score(manifests, ["aesthetics"], weights, mixed_precision="bf16")
    assert one.about["aesthetics"]["precision"] == "no"
    counted["scored"].clear()
    score(manifests, ["aesthetics"], weights, mixed_precision="bf16")
    assert counted["scored"] == {}
    # Float32 that was asked for is another wish.
    monkeypatch.undo()
    for manifest in manifests:
        parquet_path(manifest).unlink()
    score(manifests, ["aesthetics"], weights, mixed_precision="no")
    again = score(manifests, ["aesthetics"], weights, mixed_precision="bf16")
    assert again[0].about["aesthetics"]["float32_difference"] is not None


class Shifted:
    """A scorer that is off by `shift` under autocast."""

    def __init__(self, shift):
        self.shift = shift

    def score(self, views, prompts):
        exact = views.float().mean((1, 2, 3))
        return exact + self.shift if torch.is_autocast_enabled("cpu") else exact


@pytest.mark.parametrize(("shift", "kept"), [(0.001, "bf16"), (5.0, "no"), (float("nan"), "no")])
def test_the_bound_on_mixed_precision(shift, kept, capsys):
    run = CheckedPrecision("mine", Shifted(shift), "bf16", torch.device("cpu"))
    views = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    first, second = run(views, ["x"] * 4), run(views, ["x"] * 4)
    assert run.precision == kept
    expected = torch.arange(4) + (shift if kept == "bf16" else 0)
    assert torch.allclose(first, expected.double())
    assert torch.allclose(second, expected.double())
    assert ("float32" in capsys.readouterr().out) == (kept == "no")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--scorers", "mine"], "--scorers: there is no scorer 'mine'"),
        (["--scorers", "clip", "clip"], "named twice"),
        (["--weights", "clip"], "--weights: 'clip' is not NAME=PATH"),
        (["--weights", "mine=/tmp"], "--weights: 'mine=/tmp' is not NAME=PATH"),
        (["--weights", "clip=/nowhere"], "--weights clip: there is no file or directory /nowhere"),
        (["--weights", "clip.tower=."], "--weights clip.tower: clip has no such part"),
        (["--batch_size", "0"], "batch size"),
        (["--mixed_precision", "fp8"], "--mixed_precision"),
        (["--device", "abacus"], "--device abacus: "),
    ],
)
def test_bad_flags(manifests, argv, said):
    with pytest.raises(UserError, match=said):
        run_here("eval/score.py", [*manifests, *argv])
    assert not parquet_path(manifests[0]).exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pickscore", "pickscore: cannot load yuvalkirstain/PickScore_v1.*--weights pickscore=DIR"),
        ("hpsv2", "hpsv2: cannot get HPS_v2_compressed.pt from xswu/HPSv2 .*--weights hpsv2=PATH"),
        ("clip", "clip: cannot get open_clip_pytorch_model.bin from laion/.*--weights clip=PATH"),
        ("imagereward", "imagereward: cannot get ImageReward.pt from .*--weights imagereward=PATH"),
    ],
)
def test_no_network_and_no_cache(manifests, name, said):
    with pytest.raises(UserError, match=said):
        run_here("eval/score.py", [*manifests, "--scorers", name])


def test_no_network_for_a_file_by_url(manifests, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    said = r"aesthetics: cannot get sac\+logos\+ava1-l14-linearMSE\.pth from https://.*no route"
    with pytest.raises(UserError, match=said):
        argv = [*manifests, "--scorers", "aesthetics", "--cache_dir", tmp_path / "cache"]
        run_here("eval/score.py", argv)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_image_that_cannot_be_decoded(manifests, content):
    path = manifests[0].parent / "one" / "3.png"
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    with pytest.raises(UserError, match=r"one\.json, row 3: cannot decode .*3\.png .*again"):
        run_here("eval/score.py", [*manifests, "--scorers", "oracle"])


def test_a_manifest_given_twice(manifests):
    with pytest.raises(UserError, match="given twice"):
        run_here("eval/score.py", [manifests[0], manifests[0], "--scorers", "oracle"])

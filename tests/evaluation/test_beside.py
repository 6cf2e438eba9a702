"""Scoring beside the generation: each image once, in the batches of a pass over all of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from e2e.harness import generation_argv, run_here

from scripts.parity.small_scorers import write_all
from sdpo.common.errors import UserError
from sdpo.common.processes import start
from sdpo.evaluation.generate.manifest import Manifest, read_manifest, write_manifest
from sdpo.evaluation.score.beside import Beside, score_arriving
from sdpo.evaluation.score.checked_precision import CheckedPrecision
from sdpo.evaluation.score.config import ScoreOptions, ScorerConfig
from sdpo.evaluation.score.scoring import Scoring, score_manifests
from sdpo.evaluation.score.table import json_path, parquet_path, read_scores
from sdpo.tinyworld import world

NAMES = ["clip", "aesthetics"]


def each(sizes):
    return {name: sizes for name in NAMES}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two suites of 7 and 4 images."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for name, count in (("one", 7), ("two", 4)):
        (folder / name).mkdir()
        rows = []
        for i in range(count):
            scene = world.sample_scene(rng)
            world.render(scene).save(folder / name / f"{i}.png")
            rows.append((world.caption(scene), f"{name}/{i}.png", {}))
        write_manifest(folder / f"{name}.json", rows)
    return [folder / "one.json", folder / "two.json"]


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that were scored, by scorer, and the scorers that were loaded."""
    seen, loaded = {}, []
    called, begin = CheckedPrecision.__call__, CheckedPrecision.__init__

    def call(self, views, prompts):
        seen.setdefault(self.name, []).append(len(prompts))
        return called(self, views, prompts)

    def init(self, name, *rest):
        loaded.append(name)
        begin(self, name, *rest)

    monkeypatch.setattr(CheckedPrecision, "__call__", call)
    monkeypatch.setattr(CheckedPrecision, "__init__", init)
    return seen, loaded


class Told:
    """The end of a pipe; between two looks at it images are made. A step is the images to copy, by
    their suite, and what is told then, if anything."""

    def __init__(self, made, place, steps):
        self.made, self.place, self.steps = made, place, steps

    def poll(self, seconds):
        suite, images, *self.message = self.steps.pop(0)
        for i in images:
            source = self.made[0].parent / suite / f"{i}.png"
            shutil.copy(source, self.place / suite / f"{i}.png")
        return bool(self.message)

    def recv(self):
        return self.message.pop()


def copies(made, place):
    """The manifests as they will lie in `place`, whose folders are still empty."""
    found = []
    for path in made:
        (place / path.stem).mkdir(parents=True)
        entries = [
            replace(e, image=place / path.stem / e.image.name) for e in read_manifest(path).entries
        ]
        found.append(Manifest(place / path.name, entries))
    return found


def options(weights, **how):
    return ScoreOptions(ScorerConfig(batch_size=4, **how), weights, workers=1)


def test_images_are_scored_as_they_come(made, weights, batches, tmp_path):
    seen, loaded = batches
    place = tmp_path / "place"
    manifests = copies(made, place)
    # Cut off in the middle by the end of an earlier run: it will be made again.
    broken = place / "one" / "1.png"
    broken.write_bytes((made[0].parent / "one" / "1.png").read_bytes()[:-50])
    steps = [
        ("one", [0], 0),  # one of two, too few for a batch
        ("one", [2, 3]),  # three
        ("one", [1, 4]),  # five: a batch
        ("one", [5, 6]),  # three are left
        ("two", [0, 1], 1),  # five again
        ("two", [2, 3]),
        ("two", [], None),  # the last three
    ]
    scoring = Scoring(NAMES, options(weights), start(), beside=True)
    score_arriving(Told(made, place, steps), manifests, scoring)
    assert seen == each([4, 4, 3])
    assert loaded == NAMES

    # The pass after it finds everything, and the same pass without it the same.
    tables = score_manifests(manifests, NAMES, options(weights))
    assert loaded == NAMES
    alone = score_manifests([read_manifest(path) for path in made], NAMES, options(weights))
    for table, other in zip(tables, alone, strict=True):
        # In the files too, row by row, although images came in another order.
        rows, others = (
            json.loads(json_path(t.manifest.path).read_text())["scores"] for t in (table, other)
        )
        assert [r["image_sha256"] for r in rows] == [r["image_sha256"] for r in others]
        for name in NAMES:
            assert np.abs(table.columns[name] - other.columns[name]).max() < 1e-6
            assert np.ptp(other.columns[name]) > 1e-3
        assert table.about == other.about
    for path in made:
        parquet_path(path).unlink()


def test_the_same_batches_give_the_same_bits(made, weights, tmp_path):
    place = tmp_path / "place"
    manifests = copies(made, place)
    steps = [("one", range(5), 0), ("one", [5, 6]), ("two", range(4), 1), ("two", [], None)]
    scoring = Scoring(NAMES, options(weights), start(), beside=True)
    score_arriving(Told(made, place, steps), manifests, scoring)
    alone = score_manifests([read_manifest(path) for path in made], NAMES, options(weights))
    for manifest, path, other in zip(manifests, made, alone, strict=True):
        for name in NAMES:
            assert np.array_equal(read_scores(manifest).columns[name], other.columns[name])
        parquet_path(path).unlink()


def test_what_was_scored_before_stays(made, weights, batches, tmp_path):
    """By the same scorers and by others."""
    seen, loaded = batches
    place = tmp_path / "place"
    manifests = copies(made, place)
    scoring = Scoring(NAMES, options(weights), start(), beside=True)
    steps = [("one", range(7), 0), ("one", [], None)]
    score_arriving(Told(made, place, steps), manifests, scoring)
    score_manifests(manifests[:1], ["oracle"], options(weights))
    seen.clear()
    loaded.clear()
    # A killed run's successor, another image to be made.
    (place / "one" / "3.png").unlink()
    scoring = Scoring(NAMES, options(weights), start(), beside=True)
    score_arriving(
        Told(made, place, [("one", [], 0), ("one", [3]), ("one", [], None)]), manifests, scoring
    )
    assert seen == each([1])
    assert sorted(read_scores(manifests[0]).complete()) == sorted(NAMES)
    assert len(read_scores(manifests[0]).missing("oracle")) == 1


@pytest.fixture
def argv(tiny_sd15, tmp_path, weights):
    (tmp_path / "suite.txt").write_text("a red square\na blue circle\na green triangle\n")
    out = tmp_path / "out"
    more = ["--dtype", "fp32", "--scorers", *NAMES, "--score_beside"]
    more += ["--weights", *(f"{name}={path}" for name, path in weights.items())]
    return out, generation_argv(tiny_sd15, tmp_path / "suite.txt", out, *more)


def test_it_may_die(argv, batches, monkeypatch, capfd):
    """The pass at the end scores the images, and a sentence says so."""
    out, flags = argv

    def killed(self, number):
        self._process.kill()
        self._process.join()
        begun(self, number)

    begun = Beside.begun
    monkeypatch.setattr(Beside, "begun", killed)
    assert run_here("eval/evaluate.py", flags) == 0
    seen, loaded = batches
    assert (seen, loaded) == (each([3]), NAMES)
    said = capfd.readouterr().out
    assert "--score_beside ended early (exit code -9, see " in said
    assert (out / "summary.json").is_file()


def test_nothing_is_left_to_clean_up(made, weights, monkeypatch, tmp_path):
    """Of what the process makes and the system keeps, whose owner ended early a warning would
    tell."""
    told, tracker = os.pipe()
    monkeypatch.setattr("multiprocessing.resource_tracker.getfd", lambda: tracker)
    manifests = copies(made, tmp_path / "place")
    shutil.copytree(made[1].parent / "two", tmp_path / "place" / "two", dirs_exist_ok=True)
    with Beside(manifests, ["clip"], options(weights), tmp_path / "log") as beside:
        beside.begun(1)
    os.close(tracker)
    assert beside._process.exitcode == 0, (tmp_path / "log").read_text()
    assert read_scores(manifests[1]).complete() == ["clip"]
    with os.fdopen(told, "rb") as lines:
        assert b"REGISTER" not in lines.read()


def test_it_ends_with_an_error_of_the_generation(argv, monkeypatch):
    out, flags = argv
    unet = out.with_name("unet.pth")
    unet.write_bytes(b"")
    started = []
    init = Beside.__init__

    def watched(self, *arguments):
        init(self, *arguments)
        started.append(self._process)

    monkeypatch.setattr(Beside, "__init__", watched)
    with pytest.raises(UserError, match="cannot read UNet weights"):
        run_here("eval/evaluate.py", [*flags, "--unet", unet])
    assert [process.exitcode for process in started] == [-15]


def test_a_device_that_is_not_there_is_told_at_once(argv):
    out, flags = argv
    with pytest.raises(UserError, match="--device abacus: "):
        run_here("eval/evaluate.py", [*flags, "--device", "abacus"])
    assert not out.exists()

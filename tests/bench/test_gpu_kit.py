"""gpu.py on a CPU: to its end with tiny models, out of time, and with a variant that fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from e2e.harness import run_here

from scripts.bench import common, gpu, gpu_tests, training
from sdpo.common.errors import UserError

KIT = "scripts/bench/gpu.py"


def results(out):
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_tiny_to_its_end(tmp_path):
    tests = ["--tests", "tests/losses/test_on_gpu.py::test_scales"]
    assert run_here(KIT, ["--tiny", "--out", tmp_path, "--minutes", 8, *tests]) == 0
    found, page = results(tmp_path)
    nothing = {"skipped": {}, "failed": {}, "not_run": 0, "under_way": None}
    assert found["tests"] == {"exit_code": 0, "passed": 2, **nothing}
    (scene,) = found["scenes"].values()
    assert scene["failed"] == scene["left_out"] == {}
    assert set(scene["variants"]) == set(gpu.TINY.variants) and scene["cut"] == []
    plain = scene["variants"]["plain"]
    assert plain["time_to_plain"] == 1 and plain["seconds"]["count"] == 3
    # Three of four passes through the UNet are left, and none through VAE and text encoder.
    assert scene["variants"][gpu.CACHED]["flops"] < 0.75 * plain["flops"]
    assert scene["variants"]["bare"]["flops"] == pytest.approx(plain["flops"], rel=0.02)
    assert {"machine", "command", "date", "versions"} <= found.keys()
    assert "2 passed, 0 skipped, 0 failed; exit code 0." in page and "| plain | 1.00 |" in page


def test_a_base_of_ones_own(tiny_sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Steps, "measure", lambda self, variant: entry(2.0))
    argv = ["--tiny", "--parts", "speed", "--out", tmp_path, "--base", tiny_sd3]
    assert run_here(KIT, argv) == 0
    (scene,) = results(tmp_path)[0]["scenes"]
    assert scene.startswith(f"{tiny_sd3}, ")
    with pytest.raises(UserError, match="--base: there is no directory nowhere"):
        run_here(KIT, ["--tiny", "--base", "nowhere"])


def entry(seconds):
    spread = common.spread([seconds])
    return {"seconds": spread, "pairs_per_s": 8 / seconds, "peak_memory_gib": 1.0, "flops": 1e9}


def test_what_fails_is_told_and_the_rest_is_timed(tmp_path, monkeypatch):
    def measure(self, variant):
        if variant == "bare":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if variant == "lora":
            raise UserError("--lora_rank: peft is not installed")
        return entry({"plain": 2.0}.get(variant, 3.0))

    monkeypatch.setattr(gpu.Steps, "measure", measure)
    assert run_here(KIT, ["--tiny", "--parts", "speed", "--out", tmp_path]) == 1
    found, page = results(tmp_path)
    (scene,) = found["scenes"].values()
    assert scene["variants"]["public"]["time_to_plain"] == 1.5
    assert "- bare failed: OutOfMemoryError: CUDA out of memory" in page
    assert "- lora left out: --lora_rank: peft is not installed" in page


def test_what_the_time_does_not_allow_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Steps, "measure", lambda self, variant: entry(2.0))
    argv = ["--tiny", "--parts", "speed", "--minutes", 0.01, "--out", tmp_path]
    assert run_here(KIT, argv) == 0
    _, page = results(tmp_path)
    assert f"Cut by the time limit: {', '.join(gpu.TINY.variants)}." in page


def test_compiling_comes_last_and_is_not_begun_too_late(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, variants=("compile", "plain")))
    monkeypatch.setattr(
        gpu.Steps, "measure", lambda self, variant: taken.append(variant) or entry(2.0)
    )
    for number, minutes in enumerate((0.5, 8)):
        argv = ["--tiny", "--parts", "speed", "--minutes", minutes, "--out", tmp_path / str(number)]
        assert run_here(KIT, argv) == 0
    assert taken == ["plain", "plain", "compile"]
    assert "Cut by the time limit: compile." in results(tmp_path / "0")[1]


def test_some_variants_alone(tmp_path):
    options = gpu.parse(gpu.Options, ["--variants", "bare", "lora_8bit"], "gpu.py", "")
    assert [scene.variants for scene in gpu.scenes_of(options)] == [("bare",), ("lora_8bit",)]
    with pytest.raises(UserError, match="--variants: there is no quick; there are: plain public"):
        run_here(KIT, ["--tiny", "--variants", "quick"])


def test_what_was_found_is_kept_where_the_program_is_ended(tmp_path, monkeypatch):
    def measure(self, variant):
        if variant == "bare":
            raise KeyboardInterrupt
        return entry(2.0)

    monkeypatch.setattr(gpu.Steps, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run_here(KIT, ["--tiny", "--parts", "speed", "--out", tmp_path])
    found, page = results(tmp_path)
    assert set(next(iter(found["scenes"].values()))["variants"]) == {"plain", "public"}
    assert "| public | 1.00 |" in page


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_run_is_left_in_memory(tmp_path, monkeypatch, fails):
    left = []

    def style(run):
        left.append(weakref.ref(run.models.unet))
        take = training.own_step(run)

        def step(step):
            if fails:
                activations = [weight + 1 for weight in run.models.trainable]
                left.append(weakref.ref(activations[0]))
                raise torch.OutOfMemoryError("CUDA out of memory")
            take(step)

        return step

    monkeypatch.setitem(training.STYLES, "own", style)
    scene, found = gpu.TINY, gpu.nothing_found()
    steps = gpu.Steps(scene, scene.base, tmp_path / "work", torch.device("cpu"), True, found)
    steps.take(["plain"], gpu.Clock(100), lambda: None)
    assert bool(found["failed"]) == fails and len(left) == 1 + fails
    gpu.start_anew(torch.device("cpu"))
    assert [reference() for reference in left] == [None] * len(left)


def test_a_base_that_cannot_be_written_is_told_and_the_other_is_timed(tmp_path, monkeypatch):
    def writing(name, path):
        copy = f"import shutil; shutil.copytree({str(common.TINY_MODEL)!r}, {str(path)!r})"
        return [sys.executable, "-c", copy if name == "sdxl" else "raise SystemExit(3)"]

    bases = []
    monkeypatch.setattr(gpu, "writing", writing)
    monkeypatch.setattr(gpu, "find_device", lambda tiny: torch.device("cpu"))
    monkeypatch.setattr(gpu, "computed_gib", lambda *_: None)
    monkeypatch.setattr(
        gpu.Steps, "measure", lambda self, variant: bases.append(self.bench.model) or entry(2.0)
    )
    argv = ["--parts", "speed", "--out", tmp_path, "--variants", "plain"]
    assert run_here(KIT, argv) == 1
    _, page = results(tmp_path)
    assert "- its base failed: writing it ended with exit code 3" in page
    assert [base.name for base in bases] == ["sdxl"] and not bases[0].exists()


def test_a_signal_ends_the_program(tmp_path, monkeypatch):
    def style(run):
        return lambda step: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(training.STYLES, "own", style)
    argv = ["--tiny", "--parts", "speed", "--out", tmp_path, "--variants", "plain"]
    with pytest.raises(KeyboardInterrupt):
        run_here(KIT, argv)


def test_a_variant_is_ended_at_the_limit(tmp_path, monkeypatch):
    began = time.monotonic()
    with pytest.raises(TimeoutError), gpu.limited(0.05):
        try:
            time.sleep(30)
        except TimeoutError as error:  # as a compiler does
            raise RuntimeError("backend raised TimeoutError") from error
    monkeypatch.setattr(gpu, "AGAIN", 0.05)
    with pytest.raises(TimeoutError), gpu.limited(0.05):
        with suppress(TimeoutError):
            time.sleep(30)
        time.sleep(30)
    assert time.monotonic() - began < 10

    def measure(self, variant):
        if variant == "public":
            raise TimeoutError
        return entry(2.0)

    monkeypatch.setattr(gpu.Steps, "measure", measure)
    assert run_here(KIT, ["--tiny", "--parts", "speed", "--out", tmp_path]) == 0
    (scene,) = results(tmp_path)[0]["scenes"].values()
    assert scene["cut"] == ["public"] and "bare" in scene["variants"]


def test_reading_what_pytest_says():
    text = """
collecting ... collected 9 items / 2 deselected / 7 selected

tests/a.py::test_one[no-x y] PASSED                      [  1%]
tests/a.py::test_two SKIPPED (fp16 needs a GPU)          [  2%]
tests/a.py::test_three FAILED                            [  3%]
tests/a.py::test_four ERROR                              [  4%]
tests/a.py::test_five[x]
FAILED tests/a.py::test_three - AssertionError: assert 1 == 2
ERROR tests/b.py - ImportError: no module
"""
    assert gpu_tests.read(text) == {
        "passed": 1,
        "skipped": {"tests/a.py::test_two": "fp16 needs a GPU"},
        "failed": {
            "tests/a.py::test_three": "AssertionError: assert 1 == 2",
            "tests/a.py::test_four": "",
            "tests/b.py": "ImportError: no module",
        },
        "not_run": 3,
        "under_way": "tests/a.py::test_five[x]",
    }


def test_tests_that_do_not_even_begin_are_no_success(tmp_path):
    argv = ["--tiny", "--parts", "tests", "--out", tmp_path, "--tests", "tests/nowhere.py"]
    assert run_here(KIT, argv) == 1
    assert "0 failed; exit code 4." in results(tmp_path)[1]


def test_every_variant_is_one_that_train_takes(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        gpu.Steps, "_take", lambda self, flags, *_, **__: taken.append(flags) or iter(())
    )
    for number, scene in enumerate(gpu.SCENES):
        where = gpu.TINY.base, tmp_path / str(number), torch.device("cpu")
        steps = gpu.Steps(scene, *where, False, gpu.nothing_found())
        for variant in scene.variants:
            with pytest.raises(ValueError, match="not enough values"):
                steps.measure(variant)
    for flags in taken:
        config = gpu.parse_train(gpu.as_argv(flags))
        assert config.data.dataloader_num_workers == 4


def test_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="no accelerator here; --tiny"):
        run_here(KIT, ["--out", tmp_path])

"""gpu.py on a CPU: to its end with tiny models, out of time, and with a variant that fails."""

from __future__ import annotations

import json
import time

import pytest
import torch
from e2e.harness import run_here

from scripts.bench import common, gpu
from sdpo.common.errors import UserError

KIT = "scripts/bench/gpu.py"


def results(out):
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_tiny_to_its_end(tmp_path):
    tests = ["--tests", "tests/losses/test_on_gpu.py::test_scales"]
    assert run_here(KIT, ["--tiny", "--out", tmp_path, "--minutes", 8, *tests]) == 0
    found, page = results(tmp_path)
    assert found["tests"] == {"exit_code": 0, "passed": 2, "skipped": 0, "failed": []}
    (scene,) = found["scenes"].values()
    assert scene["failed"] == scene["left_out"] == {}
    assert set(scene["variants"]) == set(gpu.TINY.variants) and scene["cut"] == []
    plain = scene["variants"]["plain"]
    assert plain["time_to_plain"] == 1 and plain["seconds"]["count"] == 3
    # Three of four passes through the UNet are left, and none through VAE and text encoder.
    assert scene["variants"][gpu.CACHED]["flops"] < 0.75 * plain["flops"]
    assert scene["variants"]["bare"]["flops"] == pytest.approx(plain["flops"], rel=0.02)
    assert {"machine", "command", "date", "versions"} <= found.keys()
    assert "2 passed, 0 skipped, 0 failed." in page and "| plain | 1.00 |" in page


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


def test_a_variant_is_ended_at_the_limit(tmp_path, monkeypatch):
    began = time.monotonic()
    with pytest.raises(TimeoutError), gpu.limited(0.05):
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
tests/a.py::test_one[no-x y] PASSED                      [  1%]
tests/a.py::test_two SKIPPED (fp16 needs a GPU)          [  2%]
tests/a.py::test_three FAILED                            [  3%]
tests/a.py::test_four ERROR                              [  4%]
"""
    failed = ["tests/a.py::test_three", "tests/a.py::test_four"]
    assert gpu.read_tests(text) == {"passed": 1, "skipped": 1, "failed": failed}


def test_every_variant_is_one_that_train_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.bench.step.write_pipeline_apart", lambda *_: None)
    taken = []
    monkeypatch.setattr(
        gpu.Steps, "_take", lambda self, flags, *_, **__: taken.append(flags) or iter(())
    )
    for number, scene in enumerate(gpu.SCENES):
        steps = gpu.Steps(scene, tmp_path / str(number), torch.device("cpu"), False)
        for variant in scene.variants:
            with pytest.raises(ValueError, match="not enough values"):
                steps.measure(variant)
    for flags in taken:
        config = gpu.parse_train(gpu.as_argv(flags))
        assert config.optim.mixed_precision == "bf16"


def test_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="no accelerator here; --tiny"):
        run_here(KIT, ["--out", tmp_path])

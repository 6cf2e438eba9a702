"""Whole runs on an accelerator, against float32 on the CPU: the same pairs, times and noise, since
every draw is made on the host by its key."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from micro_bases import BUILD, save_base

from sdpo.config.families import FAMILIES

from .harness import (
    FLAGS,
    REPO,
    Run,
    base_unet,
    distance,
    generation_argv,
    rank_environments,
    run_here,
)

pytestmark = pytest.mark.gpu
SAFE = {"use_winner_preserving": True, "winner_preserving_mu": 0.9, "max_train_steps": 2}
METHODS = {"diffusion-dpo": 100.0, "dmpo": 100.0, "dspo": 0.001, "sft": 1.0}
# Of a mean squared error: TF32 in convolutions, and the formats' rounding of some hundred layers.
# In bf16 on a CPU it was at most 0.4 %, and 2.2 % of a gradient's norm.
APART = {"no": 3e-3, "bf16": 2e-2, "fp16": 1e-2}
GRADIENT_APART = {"no": 1e-2, "bf16": 6e-2, "fp16": 3e-2}
PRECISIONS = tuple(APART)
# The gradient scaler leaves out steps while it looks for its scale.
FP16_STEPS = 8


@pytest.fixture(scope="module")
def on_cpu():
    """`on_cpu(make, *args, **flags)`: the same on the CPU of this machine."""

    def call(make, *args, **flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            return make(*args, **flags)

    return call


@pytest.fixture(scope="module")
def runs(train, device, on_cpu):
    """`train`, on the device."""
    return lambda *args, **flags: (
        on_cpu(train, *args, **flags) if device.type == "cpu" else train(*args, **flags)
    )


@pytest.fixture(scope="module")
def bases(tiny_sd15, tiny_sdxl, tiny_sd3, tmp_path_factory):
    """`bases(family)`: the directory of a micro base."""
    made = {"sd15": tiny_sd15, "sdxl": tiny_sdxl, "sd3": tiny_sd3}

    def base(family):
        if family not in made:
            path = tmp_path_factory.mktemp("base") / family
            save_base(family, path)
            made[family] = path
        return {"pretrained_model_name_or_path": made[family]}

    return base


@pytest.fixture(scope="module")
def wanted(train, on_cpu, tmp_path_factory):
    """`wanted(**flags)`: the run in float32 on the CPU, made once for each set of flags."""
    made = {}

    def run(**flags):
        key = json.dumps(flags, sort_keys=True, default=str)
        if key not in made:
            made[key] = on_cpu(train, tmp_path_factory.mktemp("wanted"), **flags)
        return made[key]

    return run


def check(run, wanted, precision="no", device=None, gradient=True):
    """The first step saw the same errors and, unless it is of something else, the same gradient;
    steps are finite, and weights moved."""
    assert run.config["resolved"]["device"].startswith(device.type)
    first, true = run.metrics[0], wanted.metrics[0]
    for name in ("winner_mse", "loser_mse", "ref_winner_mse", "ref_loser_mse"):
        assert first[name] == pytest.approx(true[name], rel=APART[precision]), name
    for name in ("winner_drift", "loser_drift"):
        assert first[name] == pytest.approx(0, abs=APART[precision] * true["loser_mse"])
    # JSON has no infinity.
    norms = torch.tensor([math.nan if n is None else n for n in run.column("grad_norm")])
    assert norms.isfinite().any() if precision == "fp16" else norms.isfinite().all()
    if gradient and norms[0].isfinite():
        assert norms[0] == pytest.approx(true["grad_norm"], rel=GRADIENT_APART[precision])
    weights = run.unet()
    assert all(value.isfinite().all() for value in weights.values())
    base = base_unet(Path(run.config["args"]["pretrained_model_name_or_path"]))
    assert distance(weights, base) > 0


def skip_unless_possible(device, precision):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")


def in_precision(flags, precision):
    steps = {"max_train_steps": FP16_STEPS} if precision == "fp16" else {}
    return {**flags, **steps, "mixed_precision": precision}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", *BUILD])
def test_every_family_trains(runs, wanted, bases, device, tmp_path, family, precision):
    skip_unless_possible(device, precision)
    flags = {**SAFE, **bases(family)}
    run = runs(tmp_path / "run", **in_precision(flags, precision))
    check(run, wanted(**flags), precision, device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(runs, wanted, device, tmp_path, method, precision):
    skip_unless_possible(device, precision)
    flags = {"max_train_steps": 2} if method == "sft" else SAFE
    flags = {**flags, "train_method": method, "beta_dpo": METHODS[method]}
    run = runs(tmp_path / "run", **in_precision(flags, precision))
    check(run, wanted(**flags), precision, device)
    true = wanted(**flags).metrics[0]
    assert run.metrics[0]["loser_scale"] == pytest.approx(true["loser_scale"], abs=0.05)


@pytest.mark.parametrize(
    "more",
    [
        {"channels_last": True},
        {"no-fused_optimizer": True},
        {"use_adafactor": True},
        {"gradient_checkpointing": True},
        {"lora_rank": 4},
        {"lora_rank": 4, "use_dora": True},
        {"use_ema": True},
        {"offload_reference": True},
        {"winner_preserving_space": "parameter", "winner_preserving_scope": "pair"},
    ],
    ids=lambda more: "+".join(more),
)
def test_options(runs, wanted, device, tmp_path, more):
    same = not {"lora_rank", "winner_preserving_space"} & more.keys()
    run = runs(tmp_path / "run", **SAFE, **more)
    check(run, wanted(**SAFE), device=device, gradient=same)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_base_in_few_bits(runs, wanted, device, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    run = runs(tmp_path / "run", **SAFE, lora_rank=4, quantize_base=bits)
    first, true = run.metrics[0], wanted(**SAFE).metrics[0]
    assert first["winner_mse"] == pytest.approx(true["winner_mse"], rel=0.2)
    assert first["winner_drift"] == pytest.approx(0, abs=1e-3)
    assert all(torch.tensor(run.column("grad_norm")).isfinite())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resuming_goes_on(runs, device, tmp_path, precision):
    """As far as a device repeats itself: sums in another order in each run, not in each step."""
    skip_unless_possible(device, precision)
    flags = {**FLAGS, "train_batch_size": 2, "mixed_precision": precision}
    runs(tmp_path / "run", **{**flags, "max_train_steps": 2})
    resumed, straight = runs(tmp_path / "run", **flags), runs(tmp_path / "straight", **flags)
    assert resumed.checkpoints[-1] == straight.checkpoints[-1] == 4
    moved = distance(straight.unet(), straight.unet(2))
    assert distance(resumed.unet(), straight.unet()) <= 0.05 * moved
    assert resumed.column("lr") == straight.column("lr")


def test_from_a_cache(runs, wanted, device, tmp_path):
    caches = {"cache_dir_latents": tmp_path / "latents", "cache_dtype": "fp32"}
    built = runs(tmp_path / "built", **SAFE, **caches)
    check(built, wanted(**SAFE), device=device)
    check(runs(tmp_path / "found", **SAFE, **caches), built, device=device)


def test_from_the_references_errors(runs, wanted, device, tmp_path):
    kept = {"cache_reference": str(tmp_path / "errors")}
    built = runs(tmp_path / "built", **SAFE, **kept)
    check(built, wanted(**SAFE), device=device)
    check(runs(tmp_path / "found", **SAFE, **kept), built, device=device)


def test_two_processes(train, wanted, device, tmp_path):
    """By NCCL on two cards, by gloo on one or on the CPU. Programs, since processes that are forked
    cannot use CUDA where a library has counted its cards before (bitsandbytes does)."""
    flags = {**SAFE, "winner_preserving_scope": "pair"}
    argv = train.argv(tmp_path / "run", **flags, train_batch_size=1)
    more = {"ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}
    program = REPO / "train.py"
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        # As two machines of one card each: both have the card of local rank 0.
        more |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        program = REPO / "tests/e2e/gloo_train.py"
    errors = [tmp_path / f"stderr-{rank}" for rank in range(2)]
    ranks = []
    try:
        for own, path in zip(rank_environments(2), errors, strict=True):
            with path.open("w") as file:
                command = [sys.executable, program, *argv]
                environment = {**os.environ, **own, **more}
                ranks.append(subprocess.Popen(command, env=environment, stderr=file))
        codes = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(path.read_text() for path in errors)
    check(Run(tmp_path / "run"), wanted(**flags), device=device)


def test_families_are_all_here():
    assert {"sd15", "sdxl", "sd3", *BUILD} == set(FAMILIES)


@pytest.fixture(scope="module")
def scores(bases, on_cpu, tmp_path_factory):
    """`scores(where, dtype)`: of two images that are made and scored, the noise drawn on the CPU,
    (2, 2)."""
    from scripts.parity.small_scorers import write_all

    work = tmp_path_factory.mktemp("evaluation")
    (work / "suite.txt").write_text("a red square\na blue circle\n")
    base = bases("sd15")["pretrained_model_name_or_path"]
    weights = [f"{name}={path}" for name, path in write_all(work / "weights").items()]

    def made(where, dtype):
        out = work / f"{where}-{dtype}"
        more = ["--dtype", dtype, "--protocol", "diffusers", "--scorers", "clip", "aesthetics"]
        argv = generation_argv(base, work / "suite.txt", out, *more, "--weights", *weights)
        evaluate = on_cpu if where == "cpu" else lambda make, *args: make(*args)
        assert evaluate(run_here, "eval/evaluate.py", [*argv, "--score_batch_size", 2]) == 0
        assert len(list(out.rglob("*.png"))) == 2
        (path,) = out.glob("*_scores.json")
        rows = json.loads(path.read_text())["scores"]
        return torch.tensor([[row["clip"], row["aesthetics"]] for row in rows])

    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_images_and_scores(scores, device, dtype):
    skip_unless_possible(device, dtype)
    found = scores(device.type, dtype)
    assert found.shape == (2, 2) and found.isfinite().all()
    if dtype == "fp32":
        torch.testing.assert_close(found, scores("cpu", "fp32"), rtol=0.02, atol=0.02)


def test_compiling(runs, wanted, device, tmp_path):
    """The last one: it takes minutes."""
    if device.type == "cpu":
        pytest.skip("compiling takes minutes on a CPU")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("triton needs a C compiler, and there is none")
    check(runs(tmp_path / "run", **SAFE, compile=True), wanted(**SAFE), device=device)

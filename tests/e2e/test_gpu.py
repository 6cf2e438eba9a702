"""Whole runs on an accelerator, against float32 on the CPU: the same pairs, times and noise, since
every draw is made on the host by its key."""

from __future__ import annotations

import json

import pytest
import torch
from micro_bases import BUILD, save_base

from sdpo.config.families import FAMILIES

from .harness import FLAGS, Forked, Run, distance, generation_argv, rank_environments, run_here

pytestmark = pytest.mark.gpu
SAFE = {"use_winner_preserving": True, "winner_preserving_mu": 0.9, "max_train_steps": 2}
METHODS = {"diffusion-dpo": 100.0, "dmpo": 100.0, "dspo": 0.001, "sft": 1.0}
# Of a mean squared error: TF32 in convolutions, and the formats' rounding of some hundred layers.
APART = {"no": 5e-3, "bf16": 5e-2, "fp16": 2e-2}
PRECISIONS = tuple(APART)


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


def check(run, wanted, precision="no", device=None):
    """The first step saw the same errors; every step is finite, and weights moved."""
    assert run.config["resolved"]["device"].startswith(device.type)
    first, true = run.metrics[0], wanted.metrics[0]
    for name in ("winner_mse", "loser_mse", "ref_winner_mse", "ref_loser_mse"):
        assert first[name] == pytest.approx(true[name], rel=APART[precision]), name
    for name in ("winner_drift", "loser_drift"):
        assert first[name] == pytest.approx(0, abs=APART[precision] * true["loser_mse"])
    # The gradient scaler of fp16 may leave out steps while it looks for its scale.
    if precision != "fp16":
        assert all(torch.tensor(run.column("grad_norm")).isfinite())
    assert all(value.isfinite().all() for value in run.unet().values())


def skip_unless_possible(device, precision):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", *BUILD])
def test_every_family_trains(runs, wanted, bases, device, tmp_path, family, precision):
    skip_unless_possible(device, precision)
    flags = {**SAFE, **bases(family)}
    run = runs(tmp_path / "run", **flags, mixed_precision=precision)
    check(run, wanted(**flags), precision, device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(runs, wanted, device, tmp_path, method, precision):
    skip_unless_possible(device, precision)
    flags = {"max_train_steps": 2} if method == "sft" else SAFE
    flags = {**flags, "train_method": method, "beta_dpo": METHODS[method]}
    run = runs(tmp_path / "run", **flags, mixed_precision=precision)
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
        {"compile": True},
    ],
    ids=lambda more: "+".join(more),
)
def test_options(runs, wanted, device, tmp_path, more):
    if "compile" in more and device.type == "cpu":
        pytest.skip("compiling takes minutes on a CPU")
    check(runs(tmp_path / "run", **SAFE, **more), wanted(**SAFE), device=device)


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
    """By NCCL on two cards, by gloo on one or on the CPU."""
    environment, name = {"ACCELERATE_USE_CPU": str(device.type == "cpu").lower()}, "train.py"
    if device.type != "cpu" and torch.accelerator.device_count() < 2:
        name = "e2e/gloo_train.py"
    flags = {**SAFE, "winner_preserving_scope": "pair"}
    argv = train.argv(tmp_path / "run", **flags, train_batch_size=1)
    ranks = [
        Forked(argv, tmp_path / f"stderr-{i}", {**own, **environment}, name)
        for i, own in enumerate(rank_environments(2))
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], "\n".join(r.stderr for r in ranks)
    check(Run(tmp_path / "run"), wanted(**flags), device=device)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_images_and_scores(bases, device, on_cpu, tmp_path, dtype):
    skip_unless_possible(device, dtype)
    from scripts.parity.small_scorers import write_all

    (tmp_path / "suite.txt").write_text("a red square\na blue circle\n")
    base = bases("sd15")["pretrained_model_name_or_path"]
    found = write_all(tmp_path / "weights")
    argv = generation_argv(base, tmp_path / "suite.txt", tmp_path / "out", "--dtype", dtype)
    argv += ["--scorers", "clip", "aesthetics", "--score_batch_size", 2, "--weights"]
    argv += [f"{name}={path}" for name, path in found.items()]
    here = on_cpu if device.type == "cpu" else lambda make, *args: make(*args)
    assert here(run_here, "eval/evaluate.py", argv) == 0
    (scores,) = (tmp_path / "out").glob("*_scores.json")
    rows = json.loads(scores.read_text())["scores"]
    assert len(rows) == 2
    assert all(torch.tensor([row["clip"], row["aesthetics"]]).isfinite().all() for row in rows)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_families_are_all_here():
    assert {"sd15", "sdxl", "sd3", *BUILD} == set(FAMILIES)

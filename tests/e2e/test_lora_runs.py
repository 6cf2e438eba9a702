"""Runs of train.py with adapters, a moving average, and the reference elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdpo.common.errors import UserError
from sdpo.common.randomness import generator
from sdpo.models import get_family
from sdpo.models.base import ModelSource

from .harness import Run, base_unet, distance, files, generation_argv, identical, run_here

RANK, ALPHA = 4, 8
LORA, LORA_EMA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"
FLAGS = {
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "use_ema": True,
    "ema_decay": 0.4,
    "max_train_steps": 4,
    "checkpointing_steps": 1,
    "learning_rate": 1e-2,
    "beta_dpo": 50,
    "use_winner_preserving": True,
    "winner_preserving_scope": "pair",
    "gradient_accumulation_steps": 2,
    "adam_epsilon": 1e-3,
}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """`runs(kind)`: a run with adapters and their average, made once."""
    made = {}

    def run(kind: str) -> Run:
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp(kind), **FLAGS, sdxl=kind == "sdxl")
        return made[kind]

    return run


def product_added(base, adapters):
    """W + (alpha / rank) B A wherever a file of adapters has a layer."""
    state = {name: value.clone() for name, value in base.items()}
    layers = {k.removeprefix("unet.").rpartition(".lora_")[0] for k in adapters}
    for layer in layers:
        down, up = (adapters[f"unet.{layer}.lora_{part}.weight"] for part in "AB")
        state[f"{layer}.weight"] += ALPHA / RANK * (up @ down)
    return state, layers


def close(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], 1e-5, 1e-6) for k in a)


def test_starts_at_margin_zero_and_trains_the_adapters_alone(runs, train, kind):
    run = runs(kind)
    first, last = run.metrics[0], run.metrics[-1]
    for name in ("margin", "winner_drift", "loser_drift", "implicit_acc"):
        assert first[name] == 0.0
    assert first["loss"] == pytest.approx(0.693147, rel=1e-5)
    assert last["winner_drift"] != 0
    base = base_unet(train.models[kind])
    resolved = run.config["resolved"]
    assert resolved["unet_parameters"] == sum(v.numel() for v in base.values())
    adapters = load_file(run.out / LORA)
    assert resolved["trainable_parameters"] == sum(v.numel() for v in adapters.values())
    state = torch.load(run.out / "checkpoint-4" / "optimizer.pt", weights_only=True)["optimizer"]
    moments = sum(s["exp_avg"].numel() for s in state["state"].values())
    assert moments == resolved["trainable_parameters"]


def test_files(runs, train, kind):
    out = runs(kind).out
    base = base_unet(train.models[kind])
    for step in range(1, 5):
        directory = out / f"checkpoint-{step}"
        names = {"unet.pth", "optimizer.pt", "state.json", LORA, "unet_ema.pth", LORA_EMA}
        assert {p.name for p in directory.iterdir()} == names
        for lora, unet in ((LORA, "unet.pth"), (LORA_EMA, "unet_ema.pth")):
            plain = torch.load(directory / unet, weights_only=True)
            want, layers = product_added(base, load_file(directory / lora))
            assert close(plain, want)
            unchanged = {k for k in base if torch.equal(plain[k], base[k])}
            assert unchanged == base.keys() - {f"{layer}.weight" for layer in layers}
    for lora, pipeline, unet in (
        (LORA, "pipeline", "unet.pth"),
        (LORA_EMA, "pipeline_ema", "unet_ema.pth"),
    ):
        assert identical(load_file(out / lora), load_file(out / "checkpoint-4" / lora))
        saved = torch.load(out / "checkpoint-4" / unet, weights_only=True)
        assert identical(base_unet(out / pipeline), saved)
    assert not list(out.rglob("*.tmp"))


def averages(weights, decay):
    """The recursion over the weights after each step, from `weights[0]` at the start."""
    found = weights[0]
    for n, new in enumerate(weights[1:], 1):
        d = 0.0 if n == 1 else min(decay, n / (9 + n))
        found = {k: d * found[k] + (1 - d) * new[k] for k in new}
    return found


def test_average_is_that_of_the_adapters(runs, kind):
    out = runs(kind).out
    steps = [load_file(out / f"checkpoint-{step}" / LORA) for step in (1, 1, 2, 3, 4)]
    want, found = averages(steps, 0.4), load_file(out / LORA_EMA)
    assert close(found, want)
    assert distance(found, steps[-1]) > 1e-4


@torch.no_grad()
def prediction(unet):
    """A UNet's output for inputs of its own size, without gradients."""
    xl = unet.config.addition_embed_type is not None
    rng = generator(0, "input")
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    hidden = torch.randn(2, 7, unet.config.cross_attention_dim, generator=rng)
    added = {}
    if xl:
        width = unet.config.projection_class_embeddings_input_dim
        pooled = width - 6 * unet.config.addition_time_embed_dim
        added["text_embeds"] = torch.randn(2, pooled, generator=rng)
        added["time_ids"] = torch.full((2, 6), 32.0)
    kwargs = {"added_cond_kwargs": added} if xl else {}
    return unet(noisy, torch.tensor([3, 700]), hidden, **kwargs).sample


@pytest.mark.usefixtures("diffusers_finds_files")
@pytest.mark.parametrize("where", [".", "checkpoint-4"])
def test_diffusers_loads_the_adapters(runs, train, kind, where):
    """On the base, from a directory, the pipeline computes what the exported one does."""
    out = runs(kind).out
    family, source = get_family(kind), ModelSource(str(train.models[kind]))
    frozen = family.load_frozen(source)
    pipeline = family.pipeline(family.load_unet(source), frozen, source)
    start = prediction(pipeline.unet)
    pipeline.load_lora_weights(out / where)
    exported = family.load_unet(ModelSource(str(out / "pipeline")))
    want = prediction(exported)
    torch.testing.assert_close(prediction(pipeline.unet), want, rtol=1e-4, atol=1e-4)
    assert (want - start).abs().max() > 2e-3


def test_held_out_pairs_and_images(runs, kind, train, tmp_path):
    run = runs(kind)
    flags = [run.out, "--split", "heldout", "--max_pairs", 4, "--timesteps", 2]
    assert run_here("sdpo/evaluation/heldout.py", flags) == 0
    assert run_here("sdpo/evaluation/heldout.py", [*flags, "--ema"]) == 0
    plain, average = (
        [json.loads(line) for line in (run.out / name).read_text().splitlines()]
        for name in ("heldout.jsonl", "heldout_ema.jsonl")
    )
    assert [e["step"] for e in plain] == [e["step"] for e in average] == [0, 1, 2, 3, 4]
    # After the first step the average is the weights.
    assert average[1]["winner_mse"] == pytest.approx(plain[1]["winner_mse"], rel=1e-5)
    assert average[4]["winner_mse"] != pytest.approx(plain[4]["winner_mse"], rel=1e-5)
    (tmp_path / "suite.txt").write_text("a red square\n")
    images = []
    for unet in ("base", run.out / "checkpoint-4", run.out / "checkpoint-4" / "unet_ema.pth"):
        out = tmp_path / f"images-{len(images)}"
        model = train.models[kind]
        vae = ("--pretrained_vae_model_name_or_path", model / "vae")
        xl = ("--sdxl", *vae) if kind == "sdxl" else ()
        argv = generation_argv(
            model, tmp_path / "suite.txt", out, "--unet", unet, "--dtype", "fp32", *xl
        )
        assert run_here("eval/generate.py", argv) == 0
        (image,) = out.rglob("*.png")
        images.append(image.read_bytes())
    assert len(set(images)) == 3


def check_same(run, whole, steps):
    assert run.numbers == whole.numbers
    for step in steps:
        mine, theirs = (r.out / f"checkpoint-{step}" for r in (run, whole))
        for path in theirs.iterdir():
            if path.suffix == ".pth":
                a, b = (torch.load(d / path.name, weights_only=True) for d in (mine, theirs))
                assert identical(a, b), path.name
            if path.suffix == ".safetensors":
                assert identical(load_file(mine / path.name), load_file(path)), path.name
        optimizers = [torch.load(d / "optimizer.pt", weights_only=True) for d in (mine, theirs)]
        assert str(optimizers[0]) == str(optimizers[1])


def continued(train, whole, out, after, **flags):
    """A copy of a run that goes on after step `after`."""
    shutil.copytree(whole.out, out)
    for step in range(after + 1, flags["max_train_steps"] + 1):
        shutil.rmtree(out / f"checkpoint-{step}")
    return train(out, **flags)


def test_resumed_adapters_end_in_the_same_bits(runs, train, kind, tmp_path):
    whole = runs(kind)
    run = continued(train, whole, tmp_path / "run", 2, **FLAGS, sdxl=kind == "sdxl")
    check_same(run, whole, (3, 4))
    assert identical(load_file(run.out / LORA), load_file(whole.out / LORA))


def test_other_adapters_are_refused(runs, train):
    out = runs("sd15").out
    before = files(out)
    for flags in (
        {"lora_rank": 2},
        {"lora_rank": None, "lora_alpha": None},
        {"lora_target_modules": ["to_q"]},
        {"use_dora": True},
        {"use_ema": None},
    ):
        said = rf"--resume_from_checkpoint: .* was made with --{next(iter(flags))} "
        with pytest.raises(UserError, match=said):
            train(out, **{**FLAGS, **flags})
    assert files(out) == before


def test_two_processes_train_the_same_adapters(runs, train, tmp_path):
    flags = {**FLAGS, "train_batch_size": 1, "max_train_steps": 2}
    two = train.processes(tmp_path / "two", 2, **flags)
    one = runs("sd15")
    base = base_unet(train.models["sd15"])
    for name in ("unet.pth", "unet_ema.pth"):
        a, b = (torch.load(r.out / "checkpoint-2" / name, weights_only=True) for r in (one, two))
        moved = distance(a, base)
        assert moved > 1e-3
        assert distance(a, b) < 0.01 * moved
    for entry, expected in zip(two.numbers, one.numbers[:2], strict=True):
        assert entry == pytest.approx(expected, rel=2e-3, abs=2e-6)


HALF = {
    **FLAGS,
    "use_dora": True,
    "lora_dropout": 0.2,
    "lora_target_modules": ["to_q", "ff.net.2"],
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "max_train_steps": 3,
}


def test_everything_at_once_in_bf16(runs, train, tmp_path):
    """DoRA, dropout, checkpointing, samples, another start: the reference is that start, what is
    not adapted keeps its float32 bits, and a resumed run draws the same dropout."""
    init = tmp_path / "unet.pth"
    shutil.copy(runs("sd15").out / "checkpoint-4" / "unet.pth", init)
    flags = {**HALF, "unet_init": init, "validation_prompts": "a square", "validation_steps": 2}
    whole = train(tmp_path / "whole", **flags)
    assert whole.metrics[0]["margin"] == whole.metrics[0]["winner_drift"] == 0.0
    assert whole.metrics[-1]["winner_drift"] != 0
    assert len(list((whole.out / "samples").glob("*.png"))) == 2
    start = torch.load(init, weights_only=True)
    end = whole.unet()
    adapted = {k for k in start if k.endswith(("to_q.weight", "ff.net.2.weight"))}
    assert {k for k in start if not torch.equal(start[k], end[k])} == adapted
    lora = load_file(whole.out / LORA)
    assert {value.dtype for value in lora.values()} == {torch.float32}
    assert any("magnitude" in name for name in lora)
    run = continued(train, whole, tmp_path / "run", 1, **flags)
    check_same(run, whole, (2, 3))


def test_a_run_starts_from_another_ones_adapters(runs, train, tmp_path):
    """--lora_init: its reference is that start, for held-out pairs too, and it is resumed."""
    first, lora = runs("sd15"), tmp_path / "start.safetensors"
    shutil.copy(first.out / "checkpoint-4" / LORA, lora)
    flags = {**FLAGS, "max_train_steps": 2, "lora_init": lora, "mixed_precision": "bf16"}
    run = train(tmp_path / "run", **flags)
    assert run.metrics[0]["margin"] == run.metrics[0]["winner_drift"] == 0.0
    assert run.metrics[-1]["winner_drift"] != 0
    names = load_file(lora).keys()
    assert load_file(run.out / LORA).keys() == names
    check_same(continued(train, run, tmp_path / "again", 1, **flags), run, (2,))
    argv = ("--split", "heldout", "--max_pairs", 4, "--timesteps", 2)
    entries = []
    for out in (first.out, run.out):
        assert run_here("sdpo/evaluation/heldout.py", [out, *argv]) == 0
        lines = (out / "heldout.jsonl").read_text().splitlines()
        entries.append([json.loads(line)["winner_mse"] for line in lines])
    assert entries[1][0] == pytest.approx(entries[0][4], rel=1e-5)
    assert entries[1][0] != pytest.approx(entries[0][0], rel=1e-5)
    with pytest.raises(UserError, match="was made with --lora_init "):
        train(run.out, **{**flags, "lora_init": None})
    shutil.copy(first.out / "checkpoint-2" / LORA, lora)
    with pytest.raises(UserError, match=r"trained against another reference: .*--lora_init"):
        train(run.out, **{**flags, "max_train_steps": 3})


def test_images_of_a_base_with_a_lora_are_those_of_the_merged_unet(runs, train, kind, tmp_path):
    out, model = runs(kind).out / "checkpoint-4", train.models[kind]
    (tmp_path / "suite.txt").write_text("a red square\n")
    xl = ("--sdxl", "--pretrained_vae_model_name_or_path", model / "vae") if kind == "sdxl" else ()
    images = []
    for i, which in enumerate((["--unet", out], ["--unet", "base", "--lora", out / LORA], [])):
        to = tmp_path / str(i)
        argv = generation_argv(model, tmp_path / "suite.txt", to, *which, "--dtype", "fp32", *xl)
        assert run_here("eval/generate.py", argv) == 0
        (image,) = to.rglob("*.png")
        with Image.open(image) as opened:
            images.append(torch.tensor(list(opened.convert("RGB").tobytes())))
        (manifest,) = to.glob("*.json")
        about = json.loads(manifest.read_text())[0]["metadata"]
        assert about.get("lora") == (str(out / LORA) if i == 1 else None)
    assert (images[0] - images[1]).abs().max() <= 1
    assert (images[0] - images[2]).abs().max() > 1


FULL = {"max_train_steps": 3, "checkpointing_steps": 1, "learning_rate": 1e-3}


def test_reference_elsewhere_and_average_of_the_whole_unet(train, tmp_path):
    """Neither changes what is trained; the average is that of all weights and is resumed."""
    plain = train(tmp_path / "plain", **FULL)
    elsewhere = {"offload_reference": True, "offload_text_encoders": True}
    flags = {**FULL, **elsewhere, "use_ema": True, "ema_decay": 0.15}
    run = train(tmp_path / "run", **flags)
    assert run.numbers == plain.numbers
    assert all(identical(run.unet(step), plain.unet(step)) for step in (1, 2, 3))
    steps = [run.unet(step) for step in (1, 1, 2, 3)]
    found = torch.load(run.out / "checkpoint-3" / "unet_ema.pth", weights_only=True)
    assert found.keys() == steps[0].keys()
    assert close(found, averages(steps, 0.15))
    assert distance(found, steps[-1]) > 1e-5
    assert identical(base_unet(run.out / "pipeline_ema"), found)
    assert not list(run.out.glob("*.safetensors"))
    assert not (plain.out / "pipeline_ema").exists()
    again = continued(train, run, tmp_path / "again", 1, **flags)
    check_same(again, run, (2, 3))


def test_skipped_steps_do_not_count(train, tmp_path, monkeypatch):
    """The second step's gradients are made infinite: weights and average stay as they were."""
    from sdpo.training.update import Update

    apply = Update._step

    def spoiled(self, number, loss, grad_norm):
        return apply(self, number, loss, float("inf") if number == 2 else grad_norm)

    monkeypatch.setattr(Update, "_step", spoiled)
    run = train(tmp_path / "run", **{**FULL, "max_train_steps": 3}, use_ema=True)
    assert run.column("nonfinite_steps") == [0, 1, 1]
    assert run.checkpoints == [1, 3]
    training = torch.load(run.out / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert training["ema"] == {"steps": 2}
    steps = [run.unet(step) for step in (1, 1, 3)]
    found = torch.load(run.out / "checkpoint-3" / "unet_ema.pth", weights_only=True)
    assert close(found, averages(steps, 0.9999))


def test_held_out_average_of_a_run_without_one(train, tmp_path):
    run = train(tmp_path / "run", max_train_steps=1)
    with pytest.raises(UserError, match=r"--ema: .* holds no unet_ema.pth"):
        run_here("sdpo/evaluation/heldout.py", [run.out, "--split", "heldout", "--ema"])

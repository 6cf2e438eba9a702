"""The baselines' steps, and step.py and scaling.py at their smallest."""

from __future__ import annotations

import json

import pytest
import torch
from e2e.harness import run_here

import sdpo
from scripts.bench import common, step
from scripts.bench.public_style import autograd_scale
from scripts.bench.training import STYLES, open_run
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError
from sdpo.config import parse_train


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9])
def test_both_ways_to_the_scale_agree(mu):
    draw = torch.Generator().manual_seed(0)
    for shift in (-2.0, 0.0, 2.0):
        prediction = torch.randn(6, 4, 8, 8, generator=draw) + shift
        target = torch.randn(6, 4, 8, 8, generator=draw)
        winner, loser = (prediction - target).chunk(2)
        want = sdpo.loser_scale(winner, loser, mu, "batch")
        torch.testing.assert_close(autograd_scale(prediction, target, mu), want)


def open_tiny(tmp_path, base, pairs_dir, **more):
    flags = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": pairs_dir,
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "run",
        "resolution": 32,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-4,
        "lr_warmup_steps": 0,
        "report_to": "none",
        "use_winner_preserving": True,
        **more,
    }
    return open_run(parse_train(as_argv(flags)))


def losses(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("style", "family", "more"),
    [
        ("public", "tiny_sd15", {}),
        ("bare", "tiny_sd15", {}),
        ("bare", "tiny_sd3", {"lora_rank": 2}),
        ("example", "tiny_sd15", {"lora_rank": 2}),
    ],
)
def test_baselines_train(request, pairs_dir, tmp_path, monkeypatch, style, family, more):
    reads = []
    item = torch.Tensor.item
    run = open_tiny(tmp_path, request.getfixturevalue(family), pairs_dir, **more)
    before = [p.detach().clone() for p in run.models.trainable]
    take = STYLES[style](run)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or item(tensor))
        for one in run.steps():
            take(one)
            run.after(one)
    first, second = losses(tmp_path)
    # Nothing is learnt before the first step: u = 0 and the loss is log 2.
    assert first == pytest.approx(0.6931, abs=1e-3)
    assert second != first
    after = run.models.trainable
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Of the first public code eight reads in each of four micro-steps, beside the data's draws.
    assert len(reads) >= {"public": 8 * 4, "example": 3 * 4, "bare": 0}[style]


@pytest.mark.parametrize("scope", ["batch", "pair"])
def test_the_bare_loss_is_the_loss(tiny_sd15, pairs_dir, tmp_path, scope):
    run = open_tiny(tmp_path, tiny_sd15, pairs_dir, winner_preserving_scope=scope)
    draw = torch.Generator().manual_seed(0)
    shape = (3, 6, 4, 8, 8)
    prediction, reference, target = torch.randn(shape, generator=draw, dtype=torch.float64)
    # Close enough that no sigmoid is at its end.
    prediction, reference = target + 0.02 * prediction, target + 0.02 * reference
    gradients, values = [], []
    for loss in (
        STYLES["bare"](run)._loss,
        lambda *of: sdpo.preference_loss("diffusion-dpo", *of, beta=5000, mu=0.9, scope=scope).loss,
    ):
        leaf = prediction.clone().requires_grad_()
        value = loss(leaf, reference, target)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)
    run.lock.release()


class Stub:
    """Stands in for `Worker`: checks the flags that it is given, answers at once."""

    started: list[list[str]] = []  # noqa: RUF012

    def __init__(self, name, argv, environment=None):
        argv = [str(part) for part in argv]
        Stub.started.append(argv)
        *program, style, first = argv[:4]
        assert program == ["-m", "scripts.bench.training"] and style in STYLES
        parse_train([first, *argv[4:]])
        self.name, self.turns = name, 0

    def ready(self):
        return {"resolution": 1024}

    def start_turn(self):
        pass

    def turn(self):
        self.turns += 1
        slow = 2.0 if self.name == "public" else 1.0
        # The first turn is slow for everyone and must not count.
        seconds = 100.0 if self.turns == 1 else slow
        return {"seconds": seconds, "peak_memory_gib": slow, "pairs_per_s": 3.0}

    finish_turn = turn

    def close(self):
        pass


@pytest.fixture
def stub(monkeypatch):
    Stub.started = []
    monkeypatch.setattr(common, "Worker", Stub)
    return Stub


def test_every_variant_has_flags_that_train_takes(stub, tmp_path):
    names = [name for name in step.VARIANTS if "bit" not in name]  # of bitsandbytes
    out = tmp_path / "step.json"
    argv = ["--steps", 3, "--variants", *names, "--out", out]
    assert run_here("scripts/bench/step.py", argv) == 0
    found = json.loads(out.read_text())
    assert set(found["variants"]) == set(names)
    assert {"machine", "command", "date", "versions", "settings"} <= found.keys()
    public, plain = found["variants"]["public"], found["variants"]["plain"]
    assert public["time_to_plain"]["median"] == 2.0
    assert plain["time_to_public"]["median"] == plain["memory_to_public"] == 0.5
    assert plain["seconds"] == common.spread([1.0] * 3)


def test_larger_sizes_run_one_by_one(stub, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(
        "scripts.bench.true_size.subprocess.run", lambda argv, **_: written.append(argv)
    )
    out = tmp_path / "step.json"
    argv = ["--base", "sdxl", "--variants", "public", "--rounds", 2, "--steps", 2, "--out", out]
    assert run_here("scripts/bench/step.py", argv) == 0
    assert written[0][1:4] == ["-m", "scripts.bench.true_size", "sdxl"]
    found = json.loads(out.read_text())
    assert found["variants"]["public"]["seconds"]["count"] == 4
    assert found["settings"]["resolution"] == 1024 and found["settings"]["batch"] == 1
    order = ["public" in argv for argv in stub.started]
    assert order == [False, True, True, False]


def test_scaling_starts_all_ranks(stub, tmp_path):
    out = tmp_path / "scaling.json"
    argv = ["--processes", 2, "--steps", 2, "--out", out]
    assert run_here("scripts/bench/scaling.py", argv) == 0
    found = json.loads(out.read_text())
    assert [group["processes"] for group in found["groups"]] == [1, 2]
    assert found["groups"][1]["to_one"]["median"] == 1.0
    assert len(stub.started) == 3


@pytest.mark.parametrize(
    ("name", "argv", "sentence"),
    [
        ("step", ["--variants", "faster"], "--variants: there is no faster"),
        ("step", ["--base", "sd9"], "--base: there is no directory sd9"),
        ("step", ["--steps", 0], "--steps must be at least 1"),
        ("scaling", ["--processes", 1, 0], "--processes must be at least 1"),
    ],
)
def test_bad_flags(name, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        run_here(f"scripts/bench/{name}.py", argv)


def test_a_true_worker_takes_a_step_when_it_is_told_to(tmp_path):
    options = step.parse_options(["--pairs", "32", "--batch", "2"])
    worker = step.Bench(options, tmp_path).start("public", 0)
    try:
        worker.ready()
        entry = worker.turn()
    finally:
        worker.close()
    assert entry["step"] == 1
    assert entry["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert 0 < entry["seconds"] < 60 and entry["peak_memory_gib"] > 0.1
    assert not list(tmp_path.glob("public-0/checkpoint-*"))

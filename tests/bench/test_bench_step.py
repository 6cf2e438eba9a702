"""The public-style step, and step.py and scaling.py at their smallest."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from e2e.harness import run_here

import sdpo
from scripts.bench import common, full_size_step, step
from scripts.bench.public_style import PublicStep, autograd_scale
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


def test_public_style_step_trains(tiny_sd15, pairs_dir, tmp_path, monkeypatch):
    reads = []
    item = torch.Tensor.item
    flags = {
        "pretrained_model_name_or_path": tiny_sd15,
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
    }
    config = parse_train(as_argv(flags))
    run = open_run(config)
    take = PublicStep(config, run)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or item(tensor))
        for one in run.steps():
            take(one)
            run.after(one)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["loss"] for line in lines)
    # Nothing is learnt before the first step: u = 0 and the loss is log 2.
    assert first == pytest.approx(0.6931, abs=1e-3)
    assert second != first
    # Eight reads in each of four micro-steps, beside the draws of the data.
    assert len(reads) >= 8 * 4


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
        pass

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
    names = [name for name in step.VARIANTS if name != "8bit_adam"]
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
    argv = ["--size", "sdxl", "--variants", "public", "--rounds", 2, "--steps", 2, "--out", out]
    assert run_here("scripts/bench/step.py", argv) == 0
    assert written[0][1:4] == ["-m", "scripts.bench.true_size", "sdxl"]
    found = json.loads(out.read_text())
    assert found["variants"]["public"]["seconds"]["count"] == 4
    assert found["settings"]["resolution"] == 1024 and found["settings"]["batch"] == 1
    order = ["public" in argv for argv in stub.started]
    assert order == [False, True, True, False]
    assert all("--sdxl" in argv for argv in stub.started)


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


def test_full_size_step_with_the_tiny_model(tmp_path, monkeypatch):
    monkeypatch.setattr(
        full_size_step,
        "write_pipeline_apart",
        lambda family, path: shutil.copytree(common.TINY_MODEL, path),
    )
    out = tmp_path / "x.json"
    argv = ["--resolution", 64, "--repeats", 2, "--mixed_precision", "no", "--out", out]
    assert run_here("scripts/bench/full_size_step.py", argv) == 0
    found = json.loads(out.read_text())
    assert found["parameters"] == {"sd15": 859_520_964, "sdxl": 2_567_463_684}
    assert [entry["step"] for entry in found["first_steps"]] == [1, 2]
    # Off in the plain steps, as the loser's scale shows.
    assert found["first_steps"][0]["loser_scale"] == 1.0
    assert {name: len(taken) for name, taken in found["step_seconds"].items()} == {
        "plain": 2,
        "safeguard": 2,
    }
    plain, guarded = (found["median_seconds"][name] for name in ("plain", "safeguard"))
    assert found["overhead_of_medians"] == pytest.approx(guarded / plain - 1)
    assert found["rule_share_of_step"] == pytest.approx(found["rule_seconds"] / plain)

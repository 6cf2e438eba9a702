"""`python -m sdpo.evaluation.heldout`: what a run's checkpoints did to pairs that it never saw."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sdpo.common.randomness import generator
from sdpo.evaluation.heldout import grid

from .harness import Forked, files, program
from .test_independent import coin, condition, draw, load, pixels

PROGRAM = "sdpo/evaluation/heldout.py"
TIMESTEPS, PAIRS, SEED, BETA = 3, 5, 2, 700.0


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def run(request, train, tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("run"),
        sdxl=request.param == "sdxl",
        checkpointing_steps=2,
        learning_rate=1e-3,
        max_train_steps=3,
        beta_dpo=BETA,
        seed=SEED,
        # None of these may play a part in the evaluation.
        random_crop=True,
        proportion_empty_prompts=0.9,
        mixed_precision="bf16",
        noise_offset=0.1,
        max_train_samples=20,
    )


def evaluate(run, *arguments):
    """The program's exit code and standard error."""
    fork = Forked([run.out, *arguments], run.out.with_name("stderr"), name=PROGRAM)
    return SimpleNamespace(returncode=fork.wait(), stderr=fork.stderr)


def expected(run, model, pairs_dir, xl):
    """Errors of winners and losers, (steps, 2, timesteps, pairs), straight-line."""
    table = pq.read_table(next(pairs_dir.glob("heldout-*.parquet"))).to_pylist()
    rows = [row for row in table if row["label_0"] != 0.5]
    order = torch.randperm(len(rows), generator=generator(SEED, "max_train_samples"))
    rows = [rows[i] for i in sorted(order[:PAIRS].tolist())]
    parts = load(model, xl)
    side = 8
    errors = []
    weights = [None, *(run.unet(step) for step in run.checkpoints)]
    for state in weights:
        if state is not None:
            parts["unet"].load_state_dict(state)
        for stratum in range(TIMESTEPS):
            for i, row in enumerate(rows):
                key = (SEED, stratum, i)
                t = torch.tensor(int((stratum + coin(key, "stratum")) / TIMESTEPS * 1000))
                kept = parts["schedule"].alphas_cumprod[t]
                noise = draw(key, "noise", 4, side, side)
                images = [row["jpg_0"], row["jpg_1"]]
                if row["label_0"] != 1.0:
                    images.reverse()
                for data, stream in zip(
                    images, ("posterior-winner", "posterior-loser"), strict=True
                ):
                    with torch.no_grad():
                        posterior = parts["vae"].encode(pixels(data, False)[None]).latent_dist
                        latent = posterior.mean + posterior.std * draw(key, stream, 4, side, side)
                        latent = latent * parts["vae"].config.scaling_factor
                        noisy = kept.sqrt() * latent + (1 - kept).sqrt() * noise
                        kwargs = condition(parts, row["caption"], xl)
                        output = parts["unet"](noisy, t[None], **kwargs).sample
                    errors.append((output - noise).square().mean().item())
    shape = (len(weights), TIMESTEPS, PAIRS, 2)
    return np.array(errors).reshape(shape).transpose(0, 3, 1, 2)


def test_values(run, train, pairs_dir):
    flags = ("--split", "heldout", "--max_pairs", PAIRS, "--timesteps", TIMESTEPS)
    done = evaluate(run, *flags, "--batch_size", 2)
    assert done.returncode == 0, done.stderr
    path = run.out / "heldout.jsonl"
    first = path.read_text()
    entries = [json.loads(line) for line in first.splitlines()]
    assert [entry["step"] for entry in entries] == [0, 2, 3]
    for name in ("winner_drift", "loser_drift", "margin", "winner_drift_percent", "implicit_acc"):
        assert entries[0][name] == 0
    xl = run.config["args"]["sdxl"]
    found = expected(run, train.models["sdxl" if xl else "sd15"], pairs_dir, xl)
    drift = found - found[0]
    margin = drift[:, 0] - drift[:, 1]
    for i, entry in enumerate(entries):
        assert entry["pairs"] == PAIRS
        assert entry["timesteps"] == TIMESTEPS
        assert entry["winner_mse"] == pytest.approx(found[i, 0].mean(), rel=1e-5)
        assert entry["loser_mse"] == pytest.approx(found[i, 1].mean(), rel=1e-5)
        assert entry["ref_winner_mse"] == pytest.approx(found[0, 0].mean(), rel=1e-5)
        assert entry["winner_drift"] == pytest.approx(drift[i, 0].mean(), rel=1e-2, abs=1e-7)
        assert entry["loser_drift"] == pytest.approx(drift[i, 1].mean(), rel=1e-2, abs=1e-7)
        assert entry["margin"] == pytest.approx(margin[i].mean(), rel=5e-2, abs=1e-6)
        assert entry["winner_drift_percent"] == pytest.approx(
            100 * drift[i, 0].mean() / found[0, 0].mean(), rel=1e-2, abs=1e-5
        )
        assert entry["implicit_acc"] == pytest.approx((margin[i] < 0).mean(), abs=1.01 / 15)
    assert abs(entries[2]["winner_drift"]) > 1e-4
    told = grid(entries)
    assert [line[0] for line in told] == ["step", "0", "2", "3"]
    assert told[3][1].startswith(f"{entries[2]['winner_drift_percent']:+.2f} ± ")
    assert told[3][4] == f"{entries[2]['implicit_acc']:.3f}"
    # Another batch size splits the same draws otherwise; the numbers stay.
    assert evaluate(run, *flags, "--batch_size", 5).returncode == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    for a, b in zip(again, entries, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def test_mistakes(train, tmp_path):
    nothing = program(sys.executable, "-m", "sdpo.evaluation.heldout", tmp_path)
    assert nothing.returncode == 2
    assert nothing.stderr.splitlines()[-1].startswith("sdpo.heldout: error: ")
    assert len(nothing.stderr.splitlines()) == 1
    run = train(tmp_path / "run", max_train_steps=1)
    before = files(run.out)
    for arguments, said in (
        (("--split", "nowhere"), "--split"),
        (("--split", "heldout", "--train_data_dir", "nowhere"), "nowhere"),
        (("--split", "heldout", "--max_pairs", 0), "--max_pairs"),
    ):
        done = evaluate(run, *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert said in done.stderr.splitlines()[-1]
    (run.out / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    done = evaluate(run, "--split", "heldout")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "checkpoint" in done.stderr
    (tmp_path / "checkpoint-1").rename(run.out / "checkpoint-1")
    assert files(run.out) == before


def test_buckets(train, shaped_pairs, tmp_path):
    """The same errors whatever a batch is made of, and others than of squares."""
    found = {}
    for resize in ("bucket", "crop"):
        run = train(
            tmp_path / resize, train_data_dir=shaped_pairs, resize=resize, max_train_steps=1
        )
        for size in (1, 4):
            result = evaluate(run, "--split", "train", "--max_pairs", 9, "--batch_size", size)
            assert result.returncode == 0, result.stderr
            text = (run.out / "heldout.jsonl").read_text()
            found[resize, size] = [json.loads(line) for line in text.splitlines()]
    for resize in ("bucket", "crop"):
        for one, four in zip(found[resize, 1], found[resize, 4], strict=True):
            assert one["pairs"] == four["pairs"] == 9
            assert one == pytest.approx(four, rel=1e-4, abs=1e-7)
    errors = [found[resize, 1][0]["winner_mse"] for resize in ("bucket", "crop")]
    assert errors[0] != pytest.approx(errors[1], rel=1e-4)

"""Runs whose loser's scale is not taken at the output: in parameter space, or fixed; and of losers
drawn by chance."""

from __future__ import annotations

import shutil

import pytest

from sdpo.common.errors import UserError

from .harness import base_unet, check_close, distance, identical

PARAMETER = {
    "use_winner_preserving": True,
    "winner_preserving_mu": 0.9,
    "winner_preserving_space": "parameter",
}
PAIR = {**PARAMETER, "winner_preserving_scope": "pair"}
# As in test_processes: rounding must not be blown up by Adam.
STEADY = {"max_train_steps": 2, "adam_epsilon": 1e-3, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def output_space(train, tmp_path_factory):
    """The safeguard as published, to compare with."""
    flags = {**PARAMETER, "winner_preserving_space": "output"}
    return train(tmp_path_factory.mktemp("output"), **STEADY, **flags, train_batch_size=4)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Parameter space, a step of 4 pairs in one micro-batch."""
    return train(tmp_path_factory.mktemp("whole"), **STEADY, **PARAMETER, train_batch_size=4)


def test_parameter_space_is_another_scale(whole, output_space):
    assert all(0 < scale < 1 for scale in whole.column("loser_scale"))
    assert whole.column("loser_scale") == whole.column("loser_scale_min")
    assert not identical(whole.unet(), output_space.unet())
    first = [run.metrics[0] for run in (whole, output_space)]
    assert first[0]["loser_scale"] != pytest.approx(first[1]["loser_scale"], rel=1e-3)
    for name in ("loss", "winner_mse", "loser_mse"):
        assert first[0][name] == first[1][name]


def test_how_a_step_is_cut_does_not_matter(train, whole, tmp_path):
    """Two micro-batches of two pairs, or two processes with two pairs each; one scale a step."""
    base = base_unet(train.models["sd15"])
    flags = {**STEADY, **PARAMETER, "train_batch_size": 2}
    cut = train(tmp_path / "cut", **flags, gradient_accumulation_steps=2)
    check_close(cut, whole, base)
    two = train.processes(tmp_path / "two", 2, **flags)
    check_close(two, whole, base)
    for run in (whole, cut, two):
        assert [sum(n) for n in run.column("loser_scale_histogram")] == [1, 1]


def test_each_pair_its_own_scale(train, whole, tmp_path):
    run = train(
        tmp_path / "run", **STEADY, **PAIR, train_batch_size=2, gradient_accumulation_steps=2
    )
    for entry in run.metrics:
        assert 0 < entry["loser_scale_min"] < entry["loser_scale"] < 1
        assert sum(entry["loser_scale_histogram"]) == 4
    assert not identical(run.unet(), whole.unet())


@pytest.mark.parametrize("scope", [PARAMETER, PAIR])
def test_goes_on_in_the_same_bits(train, tmp_path, scope):
    """Also with adapters whose dropout must fall alike in both passes over a step."""
    flags = {**scope, "max_train_steps": 4, "checkpointing_steps": 2}
    flags |= {"gradient_accumulation_steps": 2, "lora_rank": 4, "lora_dropout": 0.3}
    flags |= {"gradient_checkpointing": True, "channels_last": True}
    straight = train(tmp_path / "straight", **flags)
    shutil.copytree(straight.out, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    again = train(tmp_path / "again", **flags)
    assert again.config["resolved"]["resumed_from"].endswith("checkpoint-2")
    assert identical(again.unet(), straight.unet())
    assert again.numbers == straight.numbers
    assert not identical(straight.unet(2), straight.unet(4))


def test_bf16(train, whole, tmp_path):
    run = train(tmp_path / "run", **STEADY, **PARAMETER, train_batch_size=4, mixed_precision="bf16")
    assert run.column("loser_scale") == pytest.approx(whole.column("loser_scale"), rel=0.1)


def test_fixed_scale(train, tmp_path):
    plain = train(tmp_path / "plain", **STEADY)
    runs = {c: train(tmp_path / str(c), **STEADY, loser_scale_fixed=c) for c in (0, 0.25, 1)}
    assert identical(runs[1].unet(), plain.unet())
    for c, run in runs.items():
        assert run.column("loser_scale") == run.column("loser_scale_min") == [c] * 2
        assert run.metrics[0]["loss"] == plain.metrics[0]["loss"]
    counts = runs[0.25].metrics[0]["loser_scale_histogram"]
    assert counts[5] == sum(counts) == 1
    states = [runs[c].unet() for c in (0, 0.25, 1)]
    assert not identical(states[0], states[1])
    assert not identical(states[1], states[2])
    # Without the losers' part the winners' error falls.
    assert runs[0].metrics[1]["winner_drift"] < plain.metrics[1]["winner_drift"]


def test_losers_by_chance(train, tmp_path):
    """Another course than with all losers, the same however the step is cut, resumable."""
    flags = {**STEADY, "use_winner_preserving": True, "winner_preserving_scope": "pair"}
    every = train(tmp_path / "every", **flags, train_batch_size=4)
    flags |= {"losers_one_in": 2, "checkpointing_steps": 1}
    whole = train(tmp_path / "whole", **flags, train_batch_size=4)
    cut = train(tmp_path / "cut", **flags, train_batch_size=2, gradient_accumulation_steps=2)
    moved = distance(base_unet(train.models["sd15"]), whole.unet())
    assert distance(cut.unet(), whole.unet()) < 0.01 * moved
    for name in ("loss", "loser_mse", "loser_scale"):
        assert whole.metrics[0][name] == pytest.approx(every.metrics[0][name], rel=1e-4)
    assert not identical(whole.unet(), every.unet())
    weights, numbers = cut.unet(), cut.numbers
    shutil.rmtree(cut.out / "checkpoint-2")
    again = train(cut.out, **flags, train_batch_size=2, gradient_accumulation_steps=2)
    assert again.config["resolved"]["resumed_from"].endswith("checkpoint-1")
    assert identical(again.unet(), weights)
    assert again.numbers == numbers


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"train_batch_size": 3}, "--train_batch_size must be a multiple of --losers_one_in 2"),
        ({"train_method": "sft"}, "--losers_one_in has no meaning with --train_method sft"),
        (PARAMETER, "--losers_one_in saves what --winner_preserving_space parameter needs"),
    ],
    ids=str,
)
def test_losers_by_chance_refused(make_config, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config(losers_one_in=2, **flags)

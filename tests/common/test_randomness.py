"""Draws as functions of their keys."""

from __future__ import annotations

import pytest
import torch

from sdpo.common import randomness

KEYS = [(0, 0, i) for i in range(2000)]


def test_a_draw_is_a_function_of_its_key_alone():
    first = randomness.normal((3, 4), [(1, 2, 3), (1, 2, 4)], "noise")
    torch.manual_seed(99)
    torch.rand(5)
    again = randomness.normal((3, 4), [(1, 2, 4), (1, 2, 3)], "noise")
    assert torch.equal(first, again.flip(0))
    assert randomness.uniform(1, 2, "a") == randomness.uniform(1, 2, "a")
    assert randomness.integer(100, 5, "a") == randomness.integer(100, 5, "a")


def test_drawing_leaves_the_global_state_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    randomness.normal((8,), KEYS[:3], "noise")
    randomness.timesteps(1000, KEYS[:3])
    assert torch.equal(torch.rand(3), want)


def test_every_part_of_the_key_matters():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [randomness.normal((4,), [key], stream) for key in keys for stream in ("a", "b")]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 8
    # Numbers and texts that read alike are different keys, and so are shifted ones.
    assert randomness.uniform(1, 23) != randomness.uniform(12, 3)
    assert randomness.uniform(1) != randomness.uniform("1")


def test_streams_and_neighbouring_keys_are_uncorrelated():
    a = randomness.normal((1,), KEYS, "noise").flatten()
    b = randomness.normal((1,), KEYS, "posterior-winner").flatten()
    assert a.mean().abs() < 0.1
    assert a.std().item() == pytest.approx(1, abs=0.08)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1
    assert abs(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]) < 0.1


def test_uniform_fills_the_unit_interval():
    draws = torch.tensor([randomness.uniform(*key, "flip") for key in KEYS])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert counts.min() > 120
    assert counts.max() < 280


def test_timesteps_cover_their_range():
    drawn = randomness.timesteps(1000, KEYS)
    assert drawn.shape == (2000,)
    assert drawn.dtype == torch.long
    assert 0 <= drawn.min() < 10
    assert 990 <= drawn.max() < 1000
    assert drawn.double().mean().item() == pytest.approx(499.5, abs=30)
    assert set(randomness.timesteps(3, KEYS[:100]).tolist()) == {0, 1, 2}


def test_normal_has_the_shape_asked_for():
    drawn = randomness.normal((4, 2, 3), KEYS[:5], "noise")
    assert drawn.shape == (5, 4, 2, 3)
    assert drawn.dtype == torch.float32

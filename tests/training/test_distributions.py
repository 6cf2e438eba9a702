"""Drift and scale by timestep, and the histogram of scales, against loops over single pairs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sdpo.losses.preference import LossOutput
from sdpo.models.noise import Diffusion
from sdpo.training.distributions import Distributions


def process(count):
    return Diffusion(SimpleNamespace(config=SimpleNamespace(num_train_timesteps=count)))


def output(pairs, scale, seed=0):
    g = torch.Generator().manual_seed(seed)
    drifts = torch.randn(2, pairs, generator=g)
    scale = torch.as_tensor(scale)
    per_pair = {
        "winner_drift": drifts[0],
        "loser_drift": drifts[1],
        "loser_scale": scale.expand(pairs),
    }
    return LossOutput(torch.zeros(()), {}, per_pair, scale)


def test_means_by_timestep_over_micro_batches_and_processes():
    timesteps = [[0, 99, 100, 555], [999, 50, 900, 559], [3, 4, 120, 899]]
    outputs = [output(4, torch.rand(4), seed=i) for i in range(3)]
    here, other = Distributions(process(1000)), Distributions(process(1000))
    for spread, i in ((here, 0), (here, 1), (other, 2)):
        spread.add(outputs[i], torch.tensor(timesteps[i]))
    found = Distributions.read(here.sums() + other.sums())["by_timestep"]
    for name in ("winner_drift", "loser_drift", "loser_scale"):
        for k in range(10):
            inside = [
                value
                for result, times in zip(outputs, timesteps, strict=True)
                for value, t in zip(result.per_pair[name].tolist(), times, strict=True)
                if 100 * k <= t < 100 * (k + 1)
            ]
            assert found["pairs"][k] == len(inside)
            mean = sum(inside) / len(inside) if inside else None
            assert found[name][k] == (mean if mean is None else pytest.approx(mean, rel=1e-5))
    assert found["pairs"] == [5, 2, 0, 0, 0, 2, 0, 0, 1, 2]
    assert None in found["loser_drift"]


def test_histogram_has_closed_ends():
    spread = Distributions(process(1000))
    scales = [0.0, 0.049, 0.05, 0.5, 0.95, 0.999, 1.0, 1.0]
    spread.add(output(8, scales), torch.zeros(8, dtype=torch.long))
    spread.add(output(3, 0.12), torch.zeros(3, dtype=torch.long))
    # The same one again, taken in another micro-batch.
    spread.add(output(3, 0.12), torch.zeros(3, dtype=torch.long), count_scales=False)
    found = Distributions.read(spread.sums())
    want = [0] * 20
    for index, count in ((0, 2), (1, 1), (2, 1), (10, 1), (19, 4)):
        want[index] = count
    assert found["loser_scale_histogram"] == want
    assert found["by_timestep"]["pairs"] == [14] + [0] * 9


def test_what_is_not_finite_stays_in_its_bin_and_out_of_the_histogram():
    spread = Distributions(process(1000))
    bad = output(2, [float("nan"), 0.5])
    bad.per_pair["winner_drift"][0] = float("inf")
    spread.add(bad, torch.tensor([10, 500]))
    found = Distributions.read(spread.sums())
    drift = found["by_timestep"]["winner_drift"]
    assert drift[0] == math.inf
    assert drift[5] == pytest.approx(bad.per_pair["winner_drift"][1].item())
    assert math.isnan(found["by_timestep"]["loser_scale"][0])
    assert sum(found["loser_scale_histogram"]) == found["loser_scale_histogram"][10] == 1


@pytest.mark.parametrize("count", [1000, 50, 37])
def test_names_are_the_bins_first_and_last_timestep(count):
    names = process(count).bin_names(10)
    assert len(names) == 10
    for k, name in enumerate(names):
        first, last = map(int, name.split("-"))
        assert [t for t in range(count) if t * 10 // count == k] == [*range(first, last + 1)]
    assert process(1000).bin_names(10)[0] == "000-099"

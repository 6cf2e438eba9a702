"""Metrics of an optimizer step: means, minima and sums."""

from __future__ import annotations

import pytest
import torch

from sdpo.training.metrics import StepMetrics

NOTHING = torch.zeros(0)


class Processes:
    """Stands in for an accelerator whose other processes' rows are given."""

    def __init__(self, *others):
        self.others = others
        self.calls = 0

    def gather(self, row):
        self.calls += 1
        return torch.cat([row, *(torch.tensor([other]) for other in self.others)])


def scalars(**values):
    return {k: torch.tensor(v) for k, v in values.items()}


def test_means_over_micro_steps_and_the_least_of_minima():
    metrics = StepMetrics()
    metrics.add(scalars(loss=1.0, loser_scale=0.5, loser_scale_min=0.4))
    metrics.add(scalars(loss=3.0, loser_scale=0.7, loser_scale_min=0.1))
    metrics.add(scalars(loss=5.0, loser_scale=0.9, loser_scale_min=0.8))
    found, sums, _ = metrics.reduce(Processes(), {"bad_rows": 2.0}, NOTHING)
    assert found == pytest.approx({"loss": 3.0, "loser_scale": 0.7, "loser_scale_min": 0.1})
    assert sums == {"bad_rows": 2.0}


def test_over_processes_with_one_synchronisation():
    metrics = StepMetrics()
    metrics.add(scalars(loss=1.0, loser_scale_min=0.4))
    # Means, then minima, then what is summed.
    processes = Processes(
        [3.0, 0.6, 2.0, 0.2, 1.0, 5.0, 7.0, 0.5], [8.0, 0.9, 7.0, 0.9, 0.0, 1.0, 0.0, 0.25]
    )
    more = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found, sums, more_sums = metrics.reduce(processes, {"stop": 0.0, "bad_rows": 1.0}, more)
    assert found == pytest.approx({"loss": 4.0, "loser_scale_min": 0.2})
    assert sums == {"stop": 1.0, "bad_rows": 7.0}
    assert more_sums.tolist() == [8.0, 0.75]
    assert processes.calls == 1


def test_a_value_that_is_not_finite_shows():
    metrics = StepMetrics()
    metrics.add(scalars(loss=float("nan"), margin=1.0))
    metrics.add(scalars(loss=1.0, margin=1.0))
    found, _, _ = metrics.reduce(Processes(), {}, NOTHING)
    assert found["loss"] != found["loss"]
    assert found["margin"] == 1.0


def test_any_dtype_is_averaged_in_float32():
    metrics = StepMetrics()
    metrics.add({"loss": torch.tensor(1.0, dtype=torch.float64)})
    metrics.add({"loss": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert metrics.reduce(Processes(), {}, NOTHING)[0] == {"loss": 1.5}

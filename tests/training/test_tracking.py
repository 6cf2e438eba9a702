"""What trackers are given of a metrics.jsonl line."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from sdpo.training.tracking import scalars, track

BINS = [f"{i}00-{i}99" for i in range(10)]
COUNTS = [0, 0, 3, *[0] * 16, 5]
ENTRY = {
    "step": 7,
    "epoch": 0,
    "loss": 0.5,
    "by_timestep": {
        "pairs": [3, *[0] * 8, 5],
        "winner_drift": [0.1, *[None] * 8, -0.2],
        "loser_drift": [0.3, *[None] * 8, 0.4],
        "loser_scale": [0.11, *[None] * 8, 1.0],
    },
    "loser_scale_histogram": COUNTS,
}


def test_scalars_leave_empty_bins_out():
    assert scalars(ENTRY, BINS) == {
        "loss": 0.5,
        "winner_drift_by_timestep/000-099": 0.1,
        "winner_drift_by_timestep/900-999": -0.2,
        "loser_drift_by_timestep/000-099": 0.3,
        "loser_drift_by_timestep/900-999": 0.4,
        "loser_scale_by_timestep/000-099": 0.11,
        "loser_scale_by_timestep/900-999": 1.0,
    }


def test_a_step_without_distributions_is_scalars_alone():
    logged = []
    tracker = SimpleNamespace(name="tensorboard", tracker=None)
    accelerator = SimpleNamespace(
        trackers=[tracker], log=lambda values, step: logged.append((values, step))
    )
    track(accelerator, {"step": 2, "loss": 0.25}, BINS)
    assert logged == [({"loss": 0.25}, 2)]


def test_each_tracker_gets_scalars_and_those_that_can_a_histogram(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    logged, runs = [], []
    # The package needs an account and a network; what it is handed is what counts.
    histogram = SimpleNamespace(Histogram=lambda np_histogram: ("histogram", np_histogram))
    monkeypatch.setitem(sys.modules, "wandb", histogram)
    writer = SummaryWriter(str(tmp_path))
    trackers = [
        SimpleNamespace(name="tensorboard", tracker=writer),
        SimpleNamespace(
            name="wandb",
            tracker=SimpleNamespace(log=lambda values, step: runs.append((values, step))),
        ),
        SimpleNamespace(name="mlflow", tracker=None),
    ]
    accelerator = SimpleNamespace(
        trackers=trackers, log=lambda values, step: logged.append((values, step))
    )
    track(accelerator, ENTRY, BINS)
    assert logged == [(scalars(ENTRY, BINS), 7)]

    edges = [i / 20 for i in range(21)]
    assert runs == [({"loser_scale_histogram": ("histogram", (COUNTS, edges))}, 7)]

    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Histograms("loser_scale_histogram")
    value = event.histogram_value
    assert event.step == 7
    filled = {limit: n for limit, n in zip(value.bucket_limit, value.bucket, strict=True) if n}
    assert filled == {edges[3]: 3, edges[20]: 5}
    assert (value.min, value.max, value.num) == (0, 1, 8)

"""Win rates, intervals and the sign test against scipy and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.evaluation.compare.statistics import (
    Result,
    bootstrap_means,
    compare,
    outcomes,
    sign_test,
    t_interval,
)

SCORES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 1.0]), st.sampled_from([0.0, 0.1, 0.25, 1.0])),
    min_size=1,
    max_size=20,
)


def one(a: list[float], b: list[float], ties: str = "half", seed: int = 0) -> Result:
    return compare(np.array(a)[:, None], np.array(b)[:, None], ties, seed)[0]


def test_win_rate_counts_a_tie_as_half():
    result = one([1, 2, 3, 4], [0, 2, 5, 4])
    assert (result.wins_a, result.wins_b, result.ties, result.total_pairs) == (1, 1, 2, 4)
    assert result.win_rate_a == result.win_rate_b == 0.5
    assert (result.mean_a, result.mean_b, result.mean_difference) == (2.5, 2.75, -0.25)


def test_win_rate_counts_a_tie_as_a_loss_of_whom_is_asked_about():
    result = one([1, 2, 3, 4], [0, 2, 5, 4], "loss")
    assert result.win_rate_a == result.win_rate_b == 0.25
    assert result.ties == 2


@given(SCORES, st.sampled_from(["half", "loss"]))
@settings(max_examples=30, deadline=None)
def test_results_agree_with_counting(scores, ties):
    a, b = (list(side) for side in zip(*scores, strict=True))
    result = one(a, b, ties)
    wins = sum(x > y for x, y in scores)
    tied = sum(x == y for x, y in scores)
    assert (result.wins_a, result.ties) == (wins, tied)
    assert result.wins_a + result.ties + result.wins_b == result.total_pairs == len(scores)
    credit = tied / 2 if ties == "half" else 0
    assert result.win_rate_a == pytest.approx((wins + credit) / len(scores))
    low, high = result.win_rate_a_interval
    assert 0 <= low <= result.win_rate_a <= high <= 1
    back = one(b, a, ties)
    assert (back.wins_a, back.win_rate_a) == (result.wins_b, result.win_rate_b)
    assert back.win_rate_a_interval == result.win_rate_b_interval
    assert back.sign_test_p == result.sign_test_p


def test_all_ties_decide_nothing():
    result = one([0.5] * 8, [0.5] * 8)
    assert result.win_rate_a == 0.5
    assert result.win_rate_a_interval == (0.5, 0.5)
    assert result.mean_difference_interval == (0.0, 0.0)
    assert result.sign_test_p == 1.0
    assert one([0.5] * 8, [0.5] * 8, "loss").win_rate_a == 0.0


def test_one_pair_is_its_own_interval():
    result = one([2.0], [1.5])
    assert result.win_rate_a_interval == (1.0, 1.0)
    assert result.mean_difference_interval == (0.5, 0.5)
    assert result.sign_test_p == 1.0


def test_all_wins():
    result = one([1.0] * 10, [0.0] * 10)
    assert result.win_rate_a_interval == (1.0, 1.0)
    assert result.sign_test_p == 2 / 2**10


@pytest.mark.parametrize(
    ("wins", "losses"), [(1, 0), (5, 5), (3, 9), (40, 60), (287, 200), (1700, 1500), (900, 100)]
)
def test_sign_test_is_the_exact_one(wins, losses):
    """p = min(1, 2 sum_{i <= min(wins, losses)} C(n, i) / 2^n), in integers until the division."""
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    expected = min(1.0, 2 * tail / 2**n)
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_sign_test_without_a_decided_pair_and_beyond_the_range_of_floats():
    assert sign_test(0, 0) == 1.0
    assert sign_test(3200, 0) == 0.0


def test_intervals_agree_with_scipys_bootstrap():
    rng = np.random.default_rng(3)
    values = np.stack([rng.normal(size=150), (rng.random(150) < 0.6).astype(float)], axis=1)
    ours = bootstrap_means(values, seed=1)
    for column in range(2):
        theirs = scipy.stats.bootstrap(
            (values[:, column],), np.mean, n_resamples=10_000, method="percentile", rng=rng
        ).confidence_interval
        # Two runs of 10000 resamples; the ends' own standard error is about 0.002.
        assert ours[:, column] == pytest.approx([theirs.low, theirs.high], abs=0.01)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        values = (rng.random((80, 1)) < 0.55).astype(float)
        low, high = bootstrap_means(values, seed, resamples=1000)[:, 0]
        hits += low <= 0.55 <= high
    assert 180 <= hits <= 199


def test_resampling_is_the_plain_one(monkeypatch):
    """The same draws taken one by one, so that counting how often a row was drawn is no shortcut;
    and cutting them into pieces changes nothing."""
    values = np.random.default_rng(0).normal(size=(7, 2))
    rng = np.random.default_rng(5)
    means = [values[rng.integers(0, 7, size=7, dtype=np.int32)].mean(0) for _ in range(40)]
    expected = np.quantile(means, [0.025, 0.975], axis=0)
    for at_once in (7, 70, 2_000_000):
        monkeypatch.setattr("sdpo.evaluation.compare.statistics._RESAMPLED_AT_ONCE", at_once)
        found = bootstrap_means(values, seed=5, resamples=40)
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_seed_gives_the_same_interval_whatever_other_metrics_there_are():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
    together = compare(a, b)
    alone = compare(a[:, 1:2], b[:, 1:2])
    assert together[1].win_rate_a_interval == alone[0].win_rate_a_interval
    assert together[1].mean_difference_interval == pytest.approx(alone[0].mean_difference_interval)
    assert compare(a, b) == together
    assert compare(a, b, seed=1)[0].mean_difference_interval != together[0].mean_difference_interval


def test_outcomes():
    assert outcomes(np.array([2.0, 0.0, -1.0]), "half").tolist() == [1.0, 0.5, 0.0]
    assert outcomes(np.array([2.0, 0.0, -1.0]), "loss").tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 30, 400])
def test_t_interval_is_as_wide_as_the_density_says(degrees):
    """With T = sqrt(degrees) tan(a) the density of the angle a is proportional to
    cos(a)^(degrees - 1), which is summed by the trapezoidal rule."""
    angles = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    quantile = degrees**0.5 * np.tan(np.interp(0.95, below / below[-1], angles))
    values = np.random.default_rng(degrees).normal(size=degrees + 1)
    low, high = t_interval(values)
    error = np.std(values, ddof=1) / (degrees + 1) ** 0.5
    assert (high - low) / 2 == pytest.approx(quantile * error, rel=1e-7)


def test_t_interval_is_scipys():
    values = np.array([1.0, 4.0, 2.5, -3.0])
    error = scipy.stats.sem(values)
    expected = scipy.stats.t.interval(0.95, 3, values.mean(), error)
    assert t_interval(values) == pytest.approx(expected, rel=1e-7)
    assert t_interval(values[:1]) is None

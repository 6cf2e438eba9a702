"""Win rates and score differences over pairs, with what chance alone can do to them.

The win rate of A over B is (wins + ties / 2) / pairs; with ties "loss" it is wins / pairs, so that
a tie counts against whichever side is asked about. Intervals are 95% percentile bootstrap intervals
over pairs (Efron & Tibshirani 1993, chapter 13). The sign test is the exact two-sided binomial one
(p = 1/2, ties dropped). On a handful of pairs, or where one side wins nearly all, the percentile
interval is too narrow (all wins: [1, 1]); the sign test is exact there too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIES = ("half", "loss")
RESAMPLES = 10_000
CONFIDENCE = 0.95
_RESAMPLED_AT_ONCE = 2_000_000  # pairs drawn; bounds the memory


@dataclass(frozen=True)
class Result:
    """Holds A against B over some pairs; `mean_difference` is of A's score minus B's."""

    total_pairs: int
    wins_a: int
    wins_b: int
    ties: int
    mean_a: float
    mean_b: float
    win_rate_a: float
    win_rate_a_interval: tuple[float, float]
    win_rate_b: float
    win_rate_b_interval: tuple[float, float]
    mean_difference: float
    mean_difference_interval: tuple[float, float]
    sign_test_p: float


def compare(a: np.ndarray, b: np.ndarray, ties: str = "half", seed: int = 0) -> list[Result]:
    """Compare two models, one result a metric.

    Args:
        a, b: scores of the same pairs under the same metrics, (pairs, metrics), finite; larger is
            better, and equal means tied.
        ties: "half" or "loss".
        seed: of the resampling. The same pairs are drawn for every metric, so that a metric's
            interval does not depend on which others there are.
    """
    difference = a - b
    won_a = outcomes(difference, ties)
    won_b = outcomes(-difference, ties)
    columns = np.concatenate([won_a, won_b, difference], axis=1)
    low, high = bootstrap_means(columns, seed).reshape(2, 3, -1)
    results = []
    for m in range(a.shape[1]):
        wins, losses = int((difference[:, m] > 0).sum()), int((difference[:, m] < 0).sum())
        intervals = [(float(low[i, m]), float(high[i, m])) for i in range(3)]
        results.append(
            Result(
                total_pairs=len(a),
                wins_a=wins,
                wins_b=losses,
                ties=len(a) - wins - losses,
                mean_a=float(a[:, m].mean()),
                mean_b=float(b[:, m].mean()),
                win_rate_a=float(won_a[:, m].mean()),
                win_rate_a_interval=intervals[0],
                win_rate_b=float(won_b[:, m].mean()),
                win_rate_b_interval=intervals[1],
                mean_difference=float(difference[:, m].mean()),
                mean_difference_interval=intervals[2],
                sign_test_p=sign_test(wins, losses),
            )
        )
    return results


def outcomes(difference: np.ndarray, ties: str) -> np.ndarray:
    """Count what each pair adds to the wins of the side that is better where `difference` > 0.

    Returns:
        Of the same shape: 1, 0, or for a tie 1/2 ("half") or 0 ("loss").
    """
    tied = 0.5 if ties == "half" else 0.0
    return np.where(difference == 0, tied, (difference > 0).astype(np.float64))


def bootstrap_means(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Bootstrap percentile intervals of the column means of (n, k) values, as (2, k): low, high."""
    n = len(values)
    rng = np.random.default_rng(seed)
    means = []
    at_once = max(1, _RESAMPLED_AT_ONCE // n)
    for first in range(0, resamples, at_once):
        count = min(at_once, resamples - first)
        drawn = rng.integers(0, n, size=(count, n), dtype=np.int32)
        # How often each row was drawn turns the means of all columns into one matrix product.
        drawn += np.arange(count, dtype=np.int32)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means.append(times.astype(np.float64) @ values / n)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)


def t_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Bound the mean of a few independent values, (n,), by a 95% interval of Student's t with n - 1
    degrees of freedom; None for fewer than two."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5
    mean = np.mean(values)
    return float(mean - half), float(mean + half)


def sign_test(wins: int, losses: int) -> float:
    """Compute the two-sided p of a split as one-sided, or more, of wins + losses fair coins."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))

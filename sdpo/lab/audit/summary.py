"""From an audit's lines to its numbers, with what chance alone can do to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sdpo.evaluation.compare.statistics import CONFIDENCE, bootstrap_means
from sdpo.lab.audit.updates import UPDATES
from sdpo.losses.safeguard import scale_from_products
from sdpo.training.distributions import BINS

_SEED = 0
MEASURED_ON = {
    "own": "on the batch that the update is made of",
    "next": "on the batch after it",
}


def summarise(lines: dict[str, list[dict[str, Any]]], flags: dict[str, Any]) -> dict[str, Any]:
    """Make all that is in summary.json.

    Changes are percentages of the winners' error before the step. Intervals are 95 % percentile
    bootstrap intervals over batches (updates) or pairs (jacobian).
    """
    return {
        "flags": flags,
        "updates": update_rows(lines["updates"]),
        "jacobian": jacobian_rows(lines["jacobian"], flags["winner_preserving_mu"]),
        "spectrum": lines["spectrum"],
    }


def update_rows(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a row for each mode, update and batch that the change is measured on."""
    rows = []
    keys = [(r["mode"], r["update"]) for r in batches[0]["records"]]
    for place, on in ((p, on) for p in range(len(keys)) for on in MEASURED_ON):
        mode, update = keys[place]
        records = [b["records"][place] for b in batches]
        error = np.array([numbers(b[on]["winner_error"]).mean() for b in batches])
        first = 100 * np.array([numbers(r[on]["first_order"]).mean() for r in records]) / error
        real = 100 * np.array([numbers(r[on]["realised"]).mean() for r in records]) / error
        columns = np.stack([first, real, 100.0 * (first > 0), 100.0 * (real > 0)], axis=1)
        low, high = bootstrap_means(columns, _SEED)
        names = ("first_order", "realised", "rising_first_order", "rising_realised")
        row: dict[str, Any] = {
            "mode": mode,
            "update": update,
            "on": on,
            "batches": len(batches),
            "scale": float(np.mean([r["scale"] for r in records])),
        }
        for i, name in enumerate(names):
            row[name] = float(columns[:, i].mean())
            row[f"{name}_interval"] = [float(low[i]), float(high[i])]
        row["rise_where_rising"] = float(first[first > 0].mean()) if (first > 0).any() else None
        row["by_timestep"] = _by_timestep(batches, place, on)
        rows.append(row)
    return rows


def _by_timestep(
    batches: list[dict[str, Any]], place: int, on: str
) -> dict[str, list[float | None]]:
    """Changes by timestep bin, in percent of the errors in the bin."""
    bins = np.concatenate([b[on]["bins"] for b in batches])
    error = np.concatenate([numbers(b[on]["winner_error"]) for b in batches])
    result: dict[str, list[float | None]] = {"pairs": np.bincount(bins, minlength=BINS).tolist()}
    for name in ("first_order", "realised"):
        change = np.concatenate([numbers(b["records"][place][on][name]) for b in batches])
        result[name] = [
            100 * float(change[bins == i].sum() / error[bins == i].sum())
            if (bins == i).any()
            else None
            for i in range(BINS)
        ]
    return result


def numbers(values: Sequence[Any]) -> np.ndarray:
    """Turn a list into floats; null, which stands for what was not finite, becomes NaN."""
    return np.array(values, dtype=float)


def pair_quantities(pairs: list[dict[str, Any]], mu: float) -> dict[str, np.ndarray]:
    """Compute each pair's timestep and its bin, cosines, loser/winner norm ratios and safeguard
    scales, at the output and over the parameters."""
    columns = {name: numbers([p[name] for p in pairs]) for name in pairs[0]}
    found = {name: columns[name] for name in ("timestep", "bin")}
    for space in ("output", "parameter"):
        inner = columns[f"{space}_inner"]
        winner, loser = columns[f"{space}_winner_sq"], columns[f"{space}_loser_sq"]
        found[f"{space}_cosine"] = inner / np.sqrt(winner * loser)
        found[f"{space}_ratio"] = np.sqrt(loser / winner)
        scale = scale_from_products(torch.from_numpy(winner), torch.from_numpy(inner), mu)
        found[f"{space}_scale"] = scale.numpy()
    return found


def jacobian_rows(pairs: list[dict[str, Any]], mu: float) -> dict[str, Any]:
    """Sum up the pairs: means with intervals, means by timestep bin, how the scales of the two
    spaces go together, and how often the output's scale would be too large for the pair's own
    gradients: <g_w, g_l> lam > (1 - mu) |g_w|^2, and > |g_w|^2 (the pair's winner would get
    worse)."""
    found = pair_quantities(pairs, mu)
    parameter_winner = numbers([p["parameter_winner_sq"] for p in pairs])
    conflict = found["output_scale"] * numbers([p["parameter_inner"] for p in pairs])
    found["share_below_mu"] = 100.0 * (conflict > (1 - mu) * parameter_winner)
    found["share_rising"] = 100.0 * (conflict > parameter_winner)
    names = [n for n in found if n not in ("timestep", "bin")]
    columns = np.stack([found[n] for n in names], axis=1)
    low, high = bootstrap_means(columns, _SEED)
    bins = found["bin"]
    spread = [found[f"{space}_scale"].std() for space in ("output", "parameter")]
    return {
        "pairs": len(pairs),
        "confidence": CONFIDENCE,
        "means": {
            n: {"mean": float(columns[:, i].mean()), "interval": [float(low[i]), float(high[i])]}
            for i, n in enumerate(names)
        },
        "by_timestep": {
            n: [
                float(found[n][bins == b].mean()) if (bins == b).any() else None
                for b in range(BINS)
            ]
            for n in names
        },
        "cosine_correlation": _correlation(found["output_cosine"], found["parameter_cosine"]),
        "scale_correlation": _correlation(found["output_scale"], found["parameter_scale"])
        if min(spread) > 0
        else None,
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 else None


def print_summary(summary: dict[str, Any]) -> None:
    """Print the table of updates and the Jacobians' means."""
    print(f"\n{'losers':>14} {'scale':>7}", *(f"{u:>32}" for u in UPDATES))
    print(f"{'':>14} {'':>7}", *(f"{'rising  first order  realised':>32}" for _ in UPDATES))
    for on, about in MEASURED_ON.items():
        print(about)
        by_mode: dict[str, dict[str, dict[str, Any]]] = {}
        for row in summary["updates"]:
            if row["on"] == on:
                by_mode.setdefault(row["mode"], {})[row["update"]] = row
        for mode, updates in by_mode.items():
            cells = [
                f"{r['rising_first_order']:4.0f} % {r['first_order']:+10.4f} % "
                f"{r['realised']:+9.4f} %"
                for r in (updates[u] for u in UPDATES)
            ]
            print(f"{mode:>14} {updates['adam']['scale']:7.3f}", *(f"{c:>32}" for c in cells))
    print("(rising: share of batches; changes: of the winners' error, to first order and real)\n")
    for name, found in summary["jacobian"]["means"].items():
        print(f"{name:>18} {found['mean']:9.3f}  [{found['interval'][0]:.3f}, "
              f"{found['interval'][1]:.3f}]")  # fmt: skip

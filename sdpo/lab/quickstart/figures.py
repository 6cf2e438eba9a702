"""The quickstart's pictures and table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from sdpo.common.jsonl import read_lines
from sdpo.evaluation.generate.manifest import read_manifest
from sdpo.evaluation.heldout import read_heldout
from sdpo.evaluation.score.scorers.oracle import Scorer
from sdpo.evaluation.score.table import read_scores
from sdpo.lab.drawing import BLUE, RED, plain, save, show_image, smooth, wrapped
from sdpo.training.runlog import METRICS_FILE

LABELS = {"plain": "without safeguard", "safeguard": "with safeguard"}
COLOURS = {"plain": RED, "safeguard": BLUE}
SMOOTHING = 10  # optimizer steps


def rows_of(out: Path, manifests: dict[str, Path]) -> list[dict[str, Any]]:
    """Make a row a model: held-out drift at the last checkpoint, mean oracle score with its
    standard error, share of prompts on which it beats the base, training seconds."""
    rows = []
    matrix = json.loads((out / "compare" / "matrix_oracle.json").read_text(encoding="utf-8"))
    over_base = dict(zip(matrix["models"], (row[-1] for row in matrix["win_rate"]), strict=True))
    for name, path in manifests.items():
        scores = read_scores(read_manifest(path)).columns["oracle"]
        row: dict[str, Any] = {
            "model": name,
            "oracle": float(scores.mean()),
            "oracle_se": float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else 0.0,
        }
        if name in LABELS:
            last = read_heldout(out / name)[-1]
            steps = read_lines(out / name / METRICS_FILE)
            row |= {
                "wins_over_base_percent": 100 * over_base[LABELS[name]],
                "winner_drift_percent": last["winner_drift_percent"],
                "loser_drift_percent": last["loser_drift_percent"],
                "implicit_acc": last["implicit_acc"],
                "loser_scale": float(np.mean([s["loser_scale"] for s in steps])),
                "seconds": sum(s["seconds"] for s in steps),
            }
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows; drifts in percent of the reference's held-out error."""
    head = "model,winner drift,loser drift,implicit acc,oracle,beats base,seconds"
    print("\n" + " ".join(f"{h:>18}" for h in head.split(",")))
    for row in rows:
        trained = "seconds" in row
        cells = [
            LABELS.get(row["model"], row["model"]),
            f"{row['winner_drift_percent']:+.1f} %" if trained else "-",
            f"{row['loser_drift_percent']:+.1f} %" if trained else "-",
            f"{row['implicit_acc']:.2f}" if trained else "-",
            f"{row['oracle']:.3f} ± {row['oracle_se']:.3f}",
            f"{row['wins_over_base_percent']:.0f} %" if trained else "-",
            f"{row['seconds']:.0f}" if trained else "-",
        ]
        print(" ".join(f"{c:>18}" for c in cells))
    print(f"oracle: {Scorer.meaning}")


def draw_curves(out: Path, path: Path, method: str) -> None:
    """Draw held-out errors against the reference, margin, and the safeguard's scale, over steps."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), constrained_layout=True)
    for name, label in LABELS.items():
        heldout = read_heldout(out / name)
        steps = [entry["step"] for entry in heldout]
        for axis, key in zip(
            axes[:3], ("winner_drift_percent", "loser_drift_percent", "margin"), strict=True
        ):
            values = [entry[key] for entry in heldout]
            axis.plot(steps, values, "o-", ms=3, color=COLOURS[name], label=label)
        trained = read_lines(out / name / METRICS_FILE)
        scale = smooth([entry["loser_scale"] for entry in trained], SMOOTHING)
        axes[3].plot([entry["step"] for entry in trained], scale, color=COLOURS[name], label=label)
    titles = (
        "winner: held-out error vs reference, %",
        "loser: held-out error vs reference, %",
        "held-out margin (negative: preferred);\nlower is no gain while the winner's error rises",
        "scale of the loser's gradient",
    )
    for axis, title in zip(axes, titles, strict=True):
        plain(axis, title)
    axes[3].set_ylim(-0.03, 1.06)
    axes[0].legend(frameon=False)
    figure.suptitle(f"{method} on the tiny world: same seed, same data, same step size")
    save(figure, path)


def draw_samples(manifests: dict[str, Path], path: Path, columns: int = 8) -> None:
    """Draw the same prompts and noises, a row for each model, under a line that says so."""
    read = {name: read_manifest(manifest).entries for name, manifest in manifests.items()}
    prompts = [entry.prompt for entry in next(iter(read.values()))]
    columns = min(columns, len(prompts))
    size = (1.55 * columns, 1.65 * len(read) + 1.0)
    figure, axes = plt.subplots(len(read), columns, figsize=size, squeeze=False)
    for row, (name, entries) in enumerate(read.items()):
        for column in range(columns):
            axis = axes[row, column]
            show_image(axis, entries[column].image)
            if row == 0:
                axis.set_title(wrapped(prompts[column]), fontsize=7)
        axes[row, 0].set_ylabel(LABELS.get(name, name), fontsize=9)
    about = "A column is one prompt and one noise. The base is tiny and was trained briefly."
    figure.suptitle(wrapped(about, 14 * columns), fontsize=9)
    figure.tight_layout(pad=0.6)
    save(figure, path)

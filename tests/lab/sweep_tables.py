"""Run directories and a sweep's table whose numbers are known, without training."""

from __future__ import annotations

import json
from pathlib import Path

from sdpo.common.flags import from_flat
from sdpo.config import TrainConfig
from sdpo.evaluation.evaluate import EvaluateConfig
from sdpo.lab.sweep.file import PlannedRun, Sweep

STEPS = (1, 2, 3, 4)
BETAS, MUS, SEEDS = (500.0, 5000.0), (0.5, 0.9), (0, 1, 2)
BASE_SCORE = 0.46


def value(variant: str, beta: float, mu: float, seed: int, step: int) -> float:
    """A number that tells all of its origins apart."""
    sign = 1 if variant == "none" else -1
    return sign * step * (beta / 1000 + mu) + 0.1 * seed


def planned(variants: tuple[str, ...] = ("none", "pair")) -> list[PlannedRun]:
    """A run for each variant, beta, mu and seed."""
    return [
        PlannedRun(
            f"{variant}_{beta:g}_{mu:g}_{seed}",
            variant,
            seed,
            {},
            {"beta_dpo": beta, "winner_preserving_mu": mu},
            TrainConfig(),
        )
        for variant in variants
        for beta in BETAS
        for mu in MUS
        for seed in SEEDS
    ]


def sweep_of(runs: list[PlannedRun]) -> Sweep:
    """As read from a file that asks for everything."""
    return Sweep(
        "known",
        runs,
        ("beta_dpo", "winner_preserving_mu"),
        True,
        {"split": "heldout"},
        {"scorers": "oracle"},
        from_flat(EvaluateConfig, {"scorers": ["oracle"]}),
        "all",
    )


def write_lines(path: Path, entries: list[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_summary(directory: Path, *rows: tuple[str, str, float]) -> None:
    """As evaluate.py leaves it: (suite, scorer, mean)."""
    directory.mkdir(parents=True)
    keys = ("suite", "scorer", "mean")
    rows_as = [dict(zip(keys, row, strict=True)) for row in rows]
    (directory / "summary.json").write_text(json.dumps({"rows": rows_as}))


def write_run(directory: Path, run: PlannedRun, by_timestep: bool = True) -> None:
    """What a finished run leaves, as far as a sweep reads it."""
    at = (run.variant, *run.varied.values(), run.seed)
    (directory / "pipeline").mkdir(parents=True)
    for step in (2, 4):
        (directory / f"checkpoint-{step}").mkdir()
        (directory / f"checkpoint-{step}" / "state.json").write_text("{}")
    config = {"args": {"checkpointing_steps": 2}, "resolved": {"max_train_steps": 4}}
    (directory / "config.json").write_text(json.dumps(config))
    entries = []
    for step in STEPS:
        entry = {"step": step, "loss": 0.5 * step, "loser_scale": 0.1 * step, "grad_norm": None}
        if by_timestep:
            # One pair in the first bin at every step, and `step` pairs in the last.
            empty = [None] * 8
            entry["by_timestep"] = {
                "pairs": [1, *[0] * 8, step],
                "winner_drift": [0.01 * step, *empty, value(*at, step)],
                "loser_drift": [0.0, *empty, 0.0],
                "loser_scale": [0.5, *empty, 0.1 * step],
            }
        entries.append(entry)
    write_lines(directory / "metrics.jsonl", entries)
    heldout = [
        {
            "step": step,
            "winner_drift_percent": value(*at, step),
            "loser_drift_percent": 2 * value(*at, step),
            "margin": -step,
            "implicit_acc": 0.1 * step,
        }
        for step in (0, 2, 4)
    ]
    write_lines(directory / "heldout.jsonl", heldout)


def score(run: PlannedRun, step: int) -> float:
    """The oracle's."""
    return 0.5 + 0.01 * value(run.variant, *run.varied.values(), run.seed, step)


def write_all(out: Path, runs: list[PlannedRun], by_timestep: bool = True) -> Sweep:
    """Everything that a sweep leaves, but for images."""
    write_summary(out / "images" / "base", ("tinyworld", "oracle", BASE_SCORE))
    for run in runs:
        write_run(out / "runs" / run.name, run, by_timestep)
        for step in (2, 4):
            images = out / "images" / run.name / f"checkpoint-{step}"
            write_summary(images, ("tinyworld", "oracle", score(run, step)))
    return sweep_of(runs)

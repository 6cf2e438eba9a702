"""What a sweep's runs go through: train.py, sdpo.evaluation.heldout, eval/evaluate.py, each a
program of its own, and how to see what of it is done.

    OUT/runs/<run>/                       train.py's --output_dir, with heldout.jsonl
    OUT/images/<run>/checkpoint-N/        images and scores; OUT/images/base/ those of step 0
    OUT/reference-cache/<digest>/         --cache_reference of runs that ask it the same
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.common.cli import as_argv
from sdpo.common.files import program, write_json
from sdpo.evaluation import heldout
from sdpo.evaluation.heldout import read_heldout
from sdpo.lab.sweep.file import PlannedRun, Sweep
from sdpo.lab.sweep.reference import CACHES, shared_caches
from sdpo.training.checkpoint_paths import UNET_FILE, latest_checkpoint, list_checkpoints, step_of
from sdpo.training.runlog import read_config

BASE = "base"
HELDOUT_FLAGS_FILE = "heldout_flags.json"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Stage:
    """`missing()` gives the commands that are still to be run, none where the stage is done;
    `finish()` is called when they have succeeded."""

    name: str
    missing: Callable[[], list[list[str]]]
    finish: Callable[[], None] = lambda: None


def stages_of(sweep: Sweep, out: Path) -> dict[str, list[Stage]]:
    """List the stages in their order, for each run by its name and for the base model's images."""
    caches = shared_caches(sweep.runs)
    chains = {run.name: _run_stages(sweep, run, out, caches.get(run.name)) for run in sweep.runs}
    if sweep.images is not None:
        chains[BASE] = [Stage("images", lambda: _image_commands(sweep, out, {BASE: None}))]
    return chains


def run_dir(out: Path, run: PlannedRun) -> Path:
    """Name a run's --output_dir."""
    return out / "runs" / run.name


def is_trained(directory: Path) -> bool:
    """Tell whether train.py has come to its end there: it exports the pipeline last."""
    newest = latest_checkpoint(directory)
    if newest is None or not (directory / "pipeline").is_dir():
        return False
    return step_of(newest) >= read_config(directory)["resolved"]["max_train_steps"]


def image_dirs(sweep: Sweep, run: PlannedRun, out: Path) -> dict[int, Path]:
    """Name the places of a run's images, there or to be made, by step; step 0 is the base's.

    Checkpoints that a stop left between those that were asked for are passed over.
    """
    chosen = list_checkpoints(run_dir(out, run))
    if chosen:
        *earlier, newest = chosen
        every = read_config(run_dir(out, run))["args"]["checkpointing_steps"]
        wanted = [c for c in earlier if step_of(c) % every == 0]
        chosen = [*(wanted if sweep.checkpoints == "all" else []), newest]
    own = {step_of(c): out / "images" / run.name / c.name for c in chosen}
    return {0: out / "images" / BASE, **own}


def has_scores(directory: Path, scorers: list[str]) -> bool:
    """Tell whether evaluate.py has come to its end there with these scorers: it writes the summary
    last."""
    rows = read_summary(directory)
    return bool(rows) and {row["scorer"] for row in rows} >= set(scorers)


def read_summary(directory: Path) -> list[dict[str, Any]]:
    """Read evaluate.py's means, a row for each suite and scorer; [] where there are none."""
    path = directory / SUMMARY_FILE
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def _run_stages(sweep: Sweep, run: PlannedRun, out: Path, cache: str | None) -> list[Stage]:
    directory = run_dir(out, run)
    places = {"output_dir": directory}
    if cache:
        places["cache_reference"] = out / CACHES / cache

    def training() -> list[list[str]]:
        argv = as_argv({**run.flags, **places})
        return [] if is_trained(directory) else [[*program("train.py"), *argv]]

    stages = [Stage("training", training)]
    if sweep.heldout is not None:
        flags = sweep.heldout
        note = directory / HELDOUT_FLAGS_FILE

        def measuring() -> list[list[str]]:
            same = note.is_file() and json.loads(note.read_text(encoding="utf-8")) == flags
            newest = latest_checkpoint(directory)
            entries = read_heldout(directory)
            if same and entries and newest and entries[-1]["step"] == step_of(newest):
                return []
            return [[sys.executable, "-m", heldout.__name__, str(directory), *as_argv(flags)]]

        stages.append(Stage("held-out", measuring, lambda: write_json(note, flags)))
    if sweep.images is not None:

        def drawing() -> list[list[str]]:
            unets = {
                f"{run.name}/checkpoint-{step}": directory / f"checkpoint-{step}" / UNET_FILE
                for step in image_dirs(sweep, run, out)
                if step
            }
            return _image_commands(sweep, out, unets)

        stages.append(Stage("images", drawing))
    return stages


def _image_commands(sweep: Sweep, out: Path, unets: Mapping[str, Path | None]) -> list[list[str]]:
    """Of UNets by their directory under OUT/images; None is the sweep's starting point."""
    commands = []
    for name, unet in unets.items():
        directory = out / "images" / name
        if not has_scores(directory, sweep.scorers):
            flags = {**(sweep.images or {}), "outdir": directory}
            if unet is not None:
                flags["unet"] = unet
            commands.append([*program("eval/evaluate.py"), *as_argv(flags)])
    return commands

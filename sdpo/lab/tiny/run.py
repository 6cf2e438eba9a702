"""All of the lab's questions on the tiny world, modestly: `bash scripts/lab.sh`.

    python -m sdpo.lab tiny [--out output/lab] [--sweeps scripts/lab]

Writes preference pairs to OUT/pairs, runs every sweep of the directory --sweeps into OUT/NAME,
audits the base models of the sweeps "treatments" and "flow" and, at its first checkpoint, a run of
each without the safeguard, and writes OUT/report.html. What is done is not done again: killed at
any point, the same command goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.common.flags import at_least, flag, parse
from sdpo.common.programs import run_step, run_together
from sdpo.lab.sweep.file import Sweep, read_sweep
from sdpo.lab.sweep.run import available_cores
from sdpo.lab.sweep.stages import run_dir
from sdpo.training.checkpoint_paths import list_checkpoints

PROGRAM = "python -m sdpo.lab tiny"
# The sweeps that audits look into, with how the audits' names begin, and the variant of each.
AUDITED = {"treatments": "audit", "flow": "audit-flow"}
AUDITED_VARIANT = "none"


@dataclass(frozen=True)
class TinyConfig:
    """The program's flags."""

    out: Path = flag(Path("output/lab"), "where everything is written")
    sweeps: Path = flag(
        Path("scripts/lab"), "its *.yaml are run, in the order of their names", metavar="DIR"
    )
    pairs: int = flag(4096, "training pairs", check=at_least(1))
    heldout: int = flag(128, "held-out pairs", check=at_least(1))
    audit_steps: int = flag(16, "batches of each audit", check=at_least(1))
    audit_pairs: int = flag(64, "pairs of each audit", check=at_least(1))


def parse_config(argv: Sequence[str]) -> TinyConfig:
    """Parse the program's command line and check it.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(TinyConfig, argv, PROGRAM, __doc__)
    if not sorted(config.sweeps.glob("*.yaml")):
        raise UserError(f"--sweeps: {config.sweeps} holds no *.yaml")
    check_directory(config.out, "--out")
    return config


def main(argv: Sequence[str]) -> int:
    """Run what is missing, then write the page; returns the exit code.

    Raises:
        UserError: a flag or a sweep is wrong, or a program failed.
    """
    config = parse_config(argv)

    from sdpo.tinyworld.pairs import ensure_pairs

    ensure_pairs(config.out / "pairs", config.pairs, config.heldout, seed=0, progress=True)
    sweeps = [(path, read_sweep(path)) for path in sorted(config.sweeps.glob("*.yaml"))]
    for path, sweep in sweeps:
        _check_pairs(path, sweep, config.out / "pairs")
    for path, sweep in sweeps:
        run_step([*_lab("sweep"), str(path), "--out", str(config.out / sweep.name)], sweep.name)
    commands: dict[str, list[str]] = {}
    for _, sweep in sweeps:
        if sweep.name in AUDITED:
            commands |= audits(sweep, config)
    threads = max(1, available_cores() // max(1, len(commands)))
    run_together(commands, env={**os.environ, "OMP_NUM_THREADS": str(threads)})

    from sdpo.lab.tiny.report import write

    page = write(config.out, sweeps, commands)
    print(f"\nLook at {page}")
    return 0


def _check_pairs(path: Path, sweep: Sweep, pairs: Path) -> None:
    """Refuse a sweep that trains on other pairs than the lab's, as where --out is another one."""
    for run in sweep.runs:
        given = run.config.data.train_data_dir
        if given is None or Path(given).resolve() != pairs.resolve():
            raise UserError(
                f"--out: {path} trains on {run.config.data.location}, and the pairs are in "
                f"{pairs}: give --sweeps a copy with train_data_dir: {pairs}"
            )


def audits(sweep: Sweep, config: TinyConfig) -> dict[str, list[str]]:
    """Make the audits' commands by name, of the first run of the variant that they look at."""
    planned = next((run for run in sweep.runs if run.variant == AUDITED_VARIANT), None)
    if planned is None:
        return {}
    first_saved = list_checkpoints(run_dir(config.out / sweep.name, planned))[0]
    commands = {}
    for at, checkpoint in (("start", None), ("without", first_saved)):
        name = f"{AUDITED[sweep.name]}-{at}"
        flags: dict[str, Any] = {
            **planned.flags,
            "output_dir": config.out / name,
            "checkpoint": checkpoint,
            "steps": config.audit_steps,
            "jacobian_pairs": config.audit_pairs,
            "fixed_scales": [0.5, 0.75],
        }
        commands[name] = [*_lab("audit"), *as_argv(flags)]
    return commands


def _lab(command: str) -> list[str]:
    return [sys.executable, "-m", "sdpo.lab", command]

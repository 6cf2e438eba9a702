"""All of the lab's questions on the tiny world, modestly: `bash scripts/lab.sh`.

    python -m sdpo.lab tiny [--out output/lab] [--sweeps scripts/lab]

Writes preference pairs to OUT/pairs, runs every sweep of the directory --sweeps into OUT/NAME,
audits the base model and, at its first checkpoint, a run of the sweep "treatments" without the
safeguard, and writes OUT/report.html. What is done is not done again: killed at any
point, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpo.common.cli import Parser, as_argv, at_least
from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.common.programs import run_step, run_together
from sdpo.lab.sweep.file import PlannedRun, Sweep, read_sweep
from sdpo.lab.sweep.run import available_cores
from sdpo.lab.sweep.stages import run_dir
from sdpo.training.checkpoint_paths import list_checkpoints

PROGRAM = "python -m sdpo.lab tiny"
# The sweep that audits look into, and the variant that they look at.
AUDITED = "treatments"
AUDITED_VARIANT = "none"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The program's flags.

    Raises:
        UserError: on a value out of range.
    """
    parser = Parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("output/lab"), help="default: output/lab")
    add(
        "--sweeps",
        type=Path,
        default=Path("scripts/lab"),
        metavar="DIR",
        help="its *.yaml are run, in the order of their names (default: scripts/lab)",
    )
    add("--pairs", type=int, default=4096, help="training pairs (default: 4096)")
    add("--heldout", type=int, default=128, help="held-out pairs (default: 128)")
    add("--audit_steps", type=int, default=16, help="batches of each audit (default: 16)")
    add("--audit_pairs", type=int, default=64, help="pairs of each audit (default: 64)")
    args = parser.parse_args(argv)
    at_least(args, 1, "pairs", "heldout", "audit_steps", "audit_pairs")
    if not sorted(args.sweeps.glob("*.yaml")):
        raise UserError(f"--sweeps: {args.sweeps} holds no *.yaml")
    check_directory(args.out, "--out")
    return args


def main(argv: list[str]) -> int:
    """Run what is missing, then write the page."""
    args = parse_args(argv)

    from sdpo.tinyworld.pairs import ensure_pairs

    ensure_pairs(args.out / "pairs", args.pairs, args.heldout, seed=0, progress=True)
    sweeps = [(path, read_sweep(path)) for path in sorted(args.sweeps.glob("*.yaml"))]
    for path, sweep in sweeps:
        command = [*_lab("sweep"), str(path), "--out", str(args.out / sweep.name)]
        run_step(command, sweep.name)
    commands: dict[str, list[str]] = {}
    for _, sweep in sweeps:
        if sweep.name == AUDITED:
            commands = dict(audits(sweep, args))
    threads = max(1, available_cores() // max(1, len(commands)))
    run_together(commands, env={**os.environ, "OMP_NUM_THREADS": str(threads)})

    from sdpo.lab.tiny.report import write

    page = write(args.out, sweeps, commands)
    print(f"\nLook at {page}")
    return 0


def audits(sweep: Sweep, args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The audits' commands by name."""
    planned = next((run for run in sweep.runs if run.variant == AUDITED_VARIANT), None)
    if planned is not None:
        first_saved = list_checkpoints(run_dir(args.out / sweep.name, planned))[0]
        for name, checkpoint in (("audit-start", None), ("audit-without", first_saved)):
            yield name, _audit(planned, args, name, checkpoint)


def _audit(
    planned: PlannedRun, args: argparse.Namespace, name: str, checkpoint: Path | None
) -> list[str]:
    flags: dict[str, Any] = {**planned.flags, "output_dir": args.out / name}
    flags |= {"checkpoint": checkpoint, "steps": args.audit_steps}
    flags |= {"jacobian_pairs": args.audit_pairs, "fixed_scales": [0.5, 0.75]}
    return [*_lab("audit"), *as_argv(flags)]


def _lab(command: str) -> list[str]:
    return [sys.executable, "-m", "sdpo.lab", command]

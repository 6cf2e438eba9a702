"""All of the lab's questions on the tiny world, modestly: `bash scripts/lab.sh`.

    python -m sdpo.lab tiny [--out output/lab] [--sweeps scripts/lab]

Writes preference pairs to OUT/pairs, runs every sweep of the directory --sweeps into OUT/NAME,
audits the base model and, at their first checkpoints, the runs of the sweep "treatments" without
and with the safeguard, and writes OUT/report.html. What is done is not done again: killed at any
point, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sdpo.checkpoint_paths import list_checkpoints
from sdpo.cli import Parser, as_argv
from sdpo.errors import UserError
from sdpo.lab.stages import run_dir
from sdpo.lab.sweep import available_cores
from sdpo.lab.sweep_file import PlannedRun, Sweep, read_sweep

PROGRAM = "python -m sdpo.lab tiny"
# The sweep that audits look into, and the variants that they look at.
AUDITED = "treatments"
AUDITED_VARIANTS = {"none": "audit-without", "batch": "audit-with"}
START = "audit-start"


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
    for name in ("pairs", "heldout", "audit_steps", "audit_pairs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not sorted(args.sweeps.glob("*.yaml")):
        raise UserError(f"--sweeps: {args.sweeps} holds no *.yaml")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} exists and is not a directory")
    return args


def main(argv: list[str]) -> int:
    """Run what is missing, then write the page."""
    args = parse_args(argv)
    ensure_pairs(args)
    sweeps = [(path, read_sweep(path)) for path in sorted(args.sweeps.glob("*.yaml"))]
    for path, sweep in sweeps:
        command = [*_lab("sweep"), str(path), "--out", str(args.out / sweep.name)]
        run(command, sweep.name)
    commands: dict[str, list[str]] = {}
    for _, sweep in sweeps:
        if sweep.name == AUDITED:
            commands = dict(audits(sweep, args))
    cores = available_cores()
    jobs = min(len(commands), cores) or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(run, c, name, environment) for name, c in commands.items()]
        for future in done:
            future.result()

    from sdpo.lab.tiny_report import write

    page = write(args.out, sweeps, commands)
    print(f"\nLook at {page}")
    return 0


def ensure_pairs(args: argparse.Namespace) -> None:
    """Write training and held-out pairs unless they are there."""
    from sdpo.tinyworld.pairs import write_pairs

    directory = args.out / "pairs"
    if not all(list(directory.glob(f"{split}-*.parquet")) for split in ("train", "heldout")):
        write_pairs(directory, args.pairs, args.heldout, 0, progress=True)


def audits(sweep: Sweep, args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The audits' commands by name."""
    first = {run.variant: run for run in reversed(sweep.runs)}
    if "none" in first:
        yield START, _audit(first["none"], args, START, None)
    for variant, name in AUDITED_VARIANTS.items():
        if variant in first:
            planned = first[variant]
            first_saved = list_checkpoints(run_dir(args.out / sweep.name, planned))[0]
            yield name, _audit(planned, args, name, first_saved)


def _audit(
    planned: PlannedRun, args: argparse.Namespace, name: str, checkpoint: Path | None
) -> list[str]:
    flags: dict[str, Any] = {**planned.flags, "output_dir": args.out / name}
    flags |= {"checkpoint": checkpoint, "steps": args.audit_steps}
    flags |= {"jacobian_pairs": args.audit_pairs, "fixed_scales": [0.5, 0.75]}
    return [*_lab("audit"), *as_argv(flags)]


def _lab(command: str) -> list[str]:
    return [sys.executable, "-m", "sdpo.lab", command]


def run(command: list[str], name: str, environment: dict[str, str] | None = None) -> None:
    """Run one of the lab's commands.

    Raises:
        UserError: it ended with an error, which it has printed.
    """
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise UserError(f"{name} ended with exit code {code}; see above, then run this again")

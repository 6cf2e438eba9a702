"""Training runs over methods, settings and seeds from one YAML file, measured and compared.

    python -m sdpo.lab sweep FILE.yaml [--out DIR] [--jobs N] [--dry_run]

Every run is an ordinary train.py run; then sdpo.evaluation.heldout measures it and eval/evaluate.py
makes and scores images, where the file asks for that. The file:

    name: fixed-scales
    flags:                     # train.py's, for all runs
      pretrained_model_name_or_path: assets/tiny-sd15
      train_data_dir: output/lab/pairs
    variants:                  # named sets of further flags
      none: {}
      batch: {use_winner_preserving: true}
    grid:                      # every combination
      beta_dpo: [500, 5000]
    seeds: [0, 1]
    heldout: {split: heldout}  # flags of sdpo.evaluation.heldout
    images: {suites: tinyworld, scorers: oracle, limit: 64, checkpoints: last}
                               # flags of eval/evaluate.py; checkpoints: last or all

flags is all that must be there. DIR gets runs/, images/, logs/, results.parquet, figures/, and
reference-cache/, from which runs that ask one reference the same take its errors. What is done is
not done again: killed at any point, the same command goes on. A run that fails is reported and the
others go on; the exit code is then 1.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sdpo.common.files import check_claim, check_directory, claim_directory
from sdpo.common.flags import at_least, defaults_of, flag, flat, parse
from sdpo.common.programs import Programs
from sdpo.config import TrainConfig
from sdpo.lab.sweep.devices import own_devices
from sdpo.lab.sweep.file import Sweep, read_sweep
from sdpo.lab.sweep.stages import Stage, run_dir, stages_of

PROGRAM = "python -m sdpo.lab sweep"
LOCK_FILE = ".lock"
# Of evaluate.py's flags: what says nothing of the images, or may grow.
_NOT_CLAIMED = (
    *("unet", "outdir", "check_only", "cache_dir", "scorers", "batch_size", "device"),
    *("score_batch_size", "weights", "prompt_source"),
)


@dataclass(frozen=True)
class SweepConfig:
    """The program's flags."""

    file: Path = flag(None, "what to train and to measure", metavar="FILE.yaml", positional=True)
    out: Path | None = flag(
        None, "where it is written", metavar="DIR", shown="output/lab/NAME, the file's name"
    )
    jobs: int | None = flag(
        None,
        "runs at a time; each gets one GPU, where there are any, and its share of the cores, "
        "unless OMP_NUM_THREADS says how many",
        metavar="N",
        check=at_least(1),
        shown="one a GPU; without GPUs one a core",
    )
    dry_run: bool = flag(False, "check, and print the commands still to be run")


def main(argv: Sequence[str]) -> int:
    """Run what is missing, write the table, draw; returns the exit code, 1 where a run failed.

    Raises:
        UserError: naming the flag or the file's key and what would be right.
    """
    config = parse(SweepConfig, argv, PROGRAM, __doc__)
    sweep = read_sweep(config.file)
    out = config.out or Path("output/lab") / sweep.name
    check_directory(out, "--out")
    claims = _claims(sweep, out)
    for directory, flags, what, defaults in claims:
        check_claim(directory, flags, "--out", what, defaults)
    chains = stages_of(sweep, out)
    if config.dry_run:
        print_missing(chains)
        return 0
    for directory, flags, what, defaults in claims:
        claim_directory(directory, flags, "--out", what, defaults)
    cores, devices = available_cores(), own_devices()
    jobs = min(config.jobs or len(devices) or cores, len(chains))
    places = list(islice(cycle(devices or [{}]), jobs))
    with _locked(out) as lock:
        failed = run_all(sweep, out, chains, sweep_programs(max(1, cores // jobs), lock), places)

    from sdpo.lab.sweep.figures import draw
    from sdpo.lab.sweep.results import RESULTS_FILE, console_table, read_results

    drawn = draw(sweep, out)
    for line in console_table(read_results(out / RESULTS_FILE), sweep.groups):
        print(line)
    print(f"wrote {out / RESULTS_FILE}" + (f" and {out / 'figures'}" if drawn else ""))
    if failed:
        print(f"{len(failed)} of {len(chains)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _claims(sweep: Sweep, out: Path) -> list[tuple[Path, dict[str, Any], str, dict[str, Any]]]:
    """Directories, the flags that their content depends on, what it is, and those flags'
    defaults."""

    def but(flags: dict[str, Any], *left_out: str) -> dict[str, Any]:
        return {name: value for name, value in flags.items() if name not in left_out}

    trained = defaults_of(TrainConfig)
    claims = [
        (run_dir(out, run), but(run.config.flags(), "output_dir", "cache_dir"), "a run", trained)
        for run in sweep.runs
    ]
    if (images := sweep.image_config) is not None:
        flags = but(flat(images), *_NOT_CLAIMED)
        claims.append((out / "images", flags, "images", defaults_of(type(images))))
    return claims


def print_missing(chains: dict[str, list[Stage]]) -> None:
    """Print what would be run, a command a line."""
    for name, stages in chains.items():
        pending = False
        for stage in stages:
            commands = stage.missing()
            state = "" if commands else ": depends on the above" if pending else ": done"
            print(f"# {name}, {stage.name}{state}")
            pending = pending or bool(commands)
            for command in commands:
                print(shlex.join(command))


def run_all(
    sweep: Sweep,
    out: Path,
    chains: dict[str, list[Stage]],
    programs: Programs,
    places: Sequence[dict[str, str]],
) -> list[str]:
    """Run all chains, one at each place at a time; the table is written anew at the end of each.

    Args:
        places: further variables of the environment of what runs there.

    Returns: the names of those that failed; why is said as it happens.
    """
    from tqdm.auto import tqdm

    from sdpo.lab.sweep.results import write_results

    failed: list[str] = []
    writing = threading.Lock()
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in places:
        free.put(place)
    bar = tqdm(total=sum(map(len, chains.values())), desc=sweep.name, unit="stage")

    def run_chain(name: str) -> None:
        log, place = out / "logs" / f"{name}.log", free.get()
        for done, stage in enumerate(chains[name]):
            bar.set_postfix_str(f"{name}: {stage.name}")
            sentence = run_stage(stage, log, programs, place)
            if sentence is not None:
                failed.append(name)
                bar.write(f"{name}: {sentence}", file=sys.stderr)
                bar.update(len(chains[name]) - done)
                break
            bar.update()
        free.put(place)
        with writing:
            write_results(sweep, out)

    with bar, programs.threads(len(places)) as pool:
        try:
            list(pool.map(run_chain, chains))
        except BaseException:
            bar.write("stopping; the same command goes on from here", file=sys.stderr)
            raise
    return failed


def sweep_programs(threads: int, lock: int) -> Programs:
    """Start programs with `threads` threads each, where OMP_NUM_THREADS does not say how many, and
    in sessions of their own: a Ctrl-C reaches them once, and training saves. They keep the file
    `lock` open, so that a lock on it lasts until the last of them has ended, whatever became of
    this process."""
    return Programs(
        stdin=subprocess.DEVNULL,
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
        start_new_session=True,
        pass_fds=(lock,),
    )


def last_line(log: Path) -> str:
    """Read the last line of a log that says something; progress bars rewrite theirs after a \\r."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def run_stage(stage: Stage, log: Path, programs: Programs, place: dict[str, str]) -> str | None:
    """Run what is missing of a stage, with `place` in its environment; a sentence where that
    failed."""
    commands = stage.missing()
    if not commands:
        return None
    for command in commands:
        code = programs.run(command, log, place)
        if code:
            return f"{stage.name} ended with exit code {code}: {last_line(log)} (see {log})"
    stage.finish()
    if stage.missing():
        return f"{stage.name} ended without its result (see {log})"
    return None


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Wait until no other sweep works in `out`, nor a program that a killed one left running."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{out} is in use by another sweep, or by a program that a killed one left "
                "running; waiting for its end",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()

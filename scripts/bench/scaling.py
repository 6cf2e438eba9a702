"""Pairs per second of 1, 2 and 4 processes on this machine's CPU (gloo), one thread each.

    bash scripts/bench/scaling.sh [--processes 1 2 4] [--steps 10] [--accumulation 4]

Weak scaling: every process takes --batch pairs a micro-step. All groups of processes are alive and
take one step each in turn, forwards and backwards; ratios are taken turn by turn. More processes
than cores share them, so only as many as there are cores can speed a run up. On GPUs take
train.py's own pairs_per_s (metrics.jsonl) instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench.common import (
    ROOT,
    TINY_MODEL,
    Worker,
    parser,
    print_table,
    ratios,
    spread,
    write_result,
)
from sdpo.common.cli import at_least
from sdpo.common.errors import run_main


def parse() -> argparse.Namespace:
    """The benchmark's flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    found = parser("scaling.py", __doc__)
    add = found.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    add("--steps", type=int, default=10, help="counted steps, default: 10")
    add("--batch", type=int, default=4, metavar="PAIRS", help="of each process, default: 4")
    add("--accumulation", type=int, default=1, metavar="N", help="default: 1")
    add("--resolution", type=int, default=64, metavar="PX", help="default: 64")
    args = found.parse_args()
    at_least(args, 1, "processes", "steps", "batch", "accumulation")
    # One process is what the others are compared with.
    args.processes = sorted({1, *args.processes})
    return args


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """One run of several processes."""

    def __init__(self, args: argparse.Namespace, work: Path, count: int) -> None:
        flags = {
            "pretrained_model_name_or_path": TINY_MODEL,
            "train_data_dir": work / "pairs",
            "cache_dir": work / "datasets",
            "output_dir": work / f"run-{count}",
            "resolution": args.resolution,
            "train_batch_size": args.batch,
            "gradient_accumulation_steps": args.accumulation,
            "max_train_steps": 10**6,
            "checkpointing_steps": 10**6,
            "validation_steps": 10**6,
            "report_to": "none",
        }
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        port = str(free_port())
        self.workers = []
        for rank in range(count):
            environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            if count > 1:
                environment |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "WORLD_SIZE": str(count),
                    "LOCAL_WORLD_SIZE": str(count),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                }
            program = ROOT / "scripts/bench/train_worker.py"
            self.workers.append(Worker(f"process {rank}", [program, *argv], environment))
        for worker in self.workers:
            worker.ready()

    def turn(self) -> float:
        """One step of all processes; pairs per second as the slowest measures them."""
        for worker in self.workers:
            worker.start_turn()
        return min([worker.finish_turn()["pairs_per_s"] for worker in self.workers])

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()


def measure(args: argparse.Namespace, work: Path) -> dict[int, list[float]]:
    """Pairs per second of every counted step of every group."""
    from sdpo.tinyworld.pairs import write_pairs

    write_pairs(work / "pairs", 256, 8, 0)
    groups: dict[int, Group] = {}
    try:
        for count in args.processes:
            groups[count] = Group(args, work, count)
        found: dict[int, list[float]] = {count: [] for count in groups}
        for turn in range(1 + args.steps):
            for count in reversed(groups) if turn % 2 else groups:
                found[count].append(groups[count].turn())
    finally:
        for group in groups.values():
            group.close()
    return {count: rates[1:] for count, rates in found.items()}


def main() -> int:
    """Run, print, write."""
    args = parse()
    work = Path(tempfile.mkdtemp(prefix="sdpo-bench-"))
    try:
        found = measure(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows, results = [], []
    for count, rates in found.items():
        ratio, rate = ratios(rates, found[1]), spread(rates)
        possible = min(count, os.cpu_count() or 1)
        quartiles = f"{ratio['quartile_1']:.2f}-{ratio['quartile_3']:.2f}"
        efficiency = ratio["median"] / possible
        cells = [f"{ratio['median']:.2f}", quartiles, f"{efficiency:.0%}", f"{rate['median']:.1f}"]
        rows.append([count, *cells])
        entry: dict[str, Any] = {"processes": count, "pairs_per_s": rate, "to_one": ratio}
        results.append({**entry, "share_of_possible": efficiency})
    print_table(["processes", "x one", "quartiles", "of what the cores allow", "pairs/s"], rows)
    names = ("steps", "batch", "accumulation", "resolution")
    settings = {name: getattr(args, name) for name in names}
    write_result(args.out, "scaling.py", {"settings": settings, "groups": results})
    return 0


if __name__ == "__main__":
    run_main(main, "scaling.py")

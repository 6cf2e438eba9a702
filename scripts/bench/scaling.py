"""Pairs per second of 1, 2 and 4 processes on this machine's CPU (gloo), one thread each.

    bash scripts/bench/scaling.sh [--processes 1 2 4] [--steps 10] [--accumulation 4]

Weak scaling: every process takes --batch pairs a micro-step. All groups of processes are alive and
take one step each in turn, forwards and backwards; ratios are taken turn by turn. More processes
than cores share them, so only as many as there are cores can speed a run up. On GPUs take
train.py's own pairs_per_s (metrics.jsonl) instead.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench import common
from sdpo.common.cli import as_argv
from sdpo.common.errors import run_main
from sdpo.common.flags import at_least, flag, flat, parse

ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    processes: tuple[int, ...] = flag(
        (1, 2, 4), "sizes of the groups", shown="1 2 4", check=ONE, record=False
    )
    steps: int = flag(10, "counted steps", check=ONE)
    batch: int = flag(4, "pairs of each process", metavar="PAIRS", check=ONE)
    accumulation: int = flag(1, "micro-steps a step", metavar="N", check=ONE)
    resolution: int = flag(64, "side of the images", metavar="PX")
    out: Path = flag(Path("output/bench/scaling.json"), "the figures", record=False)


def free_port() -> int:
    """Find a TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Group:
    """One run of several processes."""

    def __init__(self, options: Options, work: Path, count: int) -> None:
        flags = common.run_flags(
            work,
            f"run-{count}",
            resolution=options.resolution,
            train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
        )
        program = ["-m", "scripts.bench.training", "own", *as_argv(flags)]
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
            self.workers.append(common.Worker(f"process {rank}", program, environment))

    def ready(self) -> None:
        """Wait until all processes have built what they need."""
        for worker in self.workers:
            worker.ready()

    def turn(self) -> float:
        """Take one step in all processes; pairs per second as the slowest measures them."""
        for worker in self.workers:
            worker.start_turn()
        return min([worker.finish_turn()["pairs_per_s"] for worker in self.workers])

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()


def measure(options: Options, work: Path) -> dict[int, list[float]]:
    """Take the pairs per second of every counted step of every group."""
    from sdpo.tinyworld.pairs import write_pairs

    write_pairs(work / "pairs", 256, 8, 0)
    turns = {}
    with ExitStack() as stack:
        # One process is what the others are compared with.
        for count in sorted({1, *options.processes}):
            group = stack.enter_context(closing(Group(options, work, count)))
            group.ready()
            turns[count] = group.turn
        found = common.take_turns(turns, 1 + options.steps)
    return {count: rates[1:] for count, rates in found.items()}


def main() -> int:
    """Run, print, write."""
    options = parse(Options, sys.argv[1:], "scaling.py", __doc__)
    common.check_out(options.out)
    with common.scratch() as work:
        found = measure(options, work)
    rows: list[list[Any]] = []
    results = []
    for count, rates in found.items():
        ratio, rate = common.ratios(rates, found[1]), common.spread(rates)
        efficiency = ratio["median"] / min(count, os.cpu_count() or 1)
        cells = [f"{ratio['median']:.2f}", common.quartiles(ratio, ".2f"), f"{efficiency:.0%}"]
        rows.append([count, *cells, f"{rate['median']:.1f}"])
        entry = {"processes": count, "pairs_per_s": rate, "to_one": ratio}
        results.append({**entry, "share_of_possible": efficiency})
    common.print_table(
        ["processes", "x one", "quartiles", "of what the cores allow", "pairs/s"], rows
    )
    common.write_result(options.out, "scaling.py", {"settings": flat(options), "groups": results})
    return 0


if __name__ == "__main__":
    run_main(main, "scaling.py")

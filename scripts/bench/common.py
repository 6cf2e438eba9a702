"""What the benchmarks share: statistics, tables, the description of a machine, the JSON they leave,
and worker processes that take turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sdpo.common.cli import Parser
from sdpo.common.errors import UserError
from sdpo.common.files import write_json
from sdpo.evaluation.score.summary import print_grid

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "assets" / "tiny-sd15"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "peft")


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's parser, with --out."""
    found = Parser(name, doc)
    found.add_argument(
        "--out",
        type=Path,
        default=Path(f"output/bench/{name.removesuffix('.py')}.json"),
        metavar="FILE.json",
        help=f"default: output/bench/{name.removesuffix('.py')}.json",
    )
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles, least and largest of a sample, and its size."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else None
    return {
        "median": statistics.median(ordered),
        "quartile_1": quartiles[0] if quartiles else ordered[0],
        "quartile_3": quartiles[2] if quartiles else ordered[0],
        "least": ordered[0],
        "largest": ordered[-1],
        "count": len(ordered),
    }


def ratios(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The spread of turn-by-turn quotients: what drifts within a run cancels in each of them."""
    return spread([a / b for a, b in zip(values, baseline, strict=True)])


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns aligned: the first to the left, the others to the right."""
    print_grid([[str(cell) for cell in row] for row in (head, *rows)])


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB and GPUs; nothing that names the machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_result(out: Path, program: str, results: dict[str, Any]) -> None:
    """`results` as JSON, with the machine, the command, the date and the versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "benchmark": program,
        "command": shlex.join(["python", f"scripts/bench/{program}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions,
    }
    write_json(out, {**about, **results})
    print(f"wrote {out}")


class Worker:
    """A process that does one thing each time it is told to, and answers with a line of JSON."""

    def __init__(self, name: str, argv: Sequence[Any], environment: dict[str, str] | None = None):
        """Start `python argv...`; its standard error goes to a file that `fail` quotes."""
        import tempfile

        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ready(self) -> None:
        """Wait until it has built what it needs."""
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Have it do its thing once; returns its answer."""
        self.start_turn()
        return self._answer()

    def start_turn(self) -> None:
        """As `turn`, without waiting: workers that depend on each other are all started first."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return self._fail()

    finish_turn = _answer

    def _fail(self) -> Any:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        raise UserError(f"{self.name} ended with exit code {code}: {lines[-1]}")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


def answer(value: dict[str, Any]) -> None:
    """A worker's side of `Worker`: one line of JSON."""
    print(json.dumps(value), flush=True)

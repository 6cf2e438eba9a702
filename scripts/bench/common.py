"""What the benchmarks share: turns, statistics, tables, the description of a machine, the JSON they
leave, and worker processes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory, write_json
from sdpo.evaluation.score.summary import print_grid

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "assets" / "tiny-sd15"
PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "datasets", "peft"),
    "bitsandbytes",
)

Name = TypeVar("Name")
Value = TypeVar("Value")


def run_flags(work: Path, name: str, **more: Any) -> dict[str, Any]:
    """Name the flags of an endless run of train.py in work/`name`, on the pairs in work/pairs and,
    unless `more` names another, of the tiny model of assets/."""
    never = 10**6
    return {
        "pretrained_model_name_or_path": TINY_MODEL,
        "train_data_dir": work / "pairs",
        "cache_dir": work / "datasets",
        "output_dir": work / name,
        "max_train_steps": never,
        "checkpointing_steps": never,
        "validation_steps": never,
        "learning_rate": 1e-8,
        "lr_warmup_steps": 0,
        "report_to": "none",
        **more,
    }


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a directory that is deleted afterwards."""
    prefix = "sdpo-bench-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as work:
        yield Path(work)


def grainy(scene: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """Enlarge a drawn scene to `side` pixels square and give it a photograph's grain (deviation 6
    of 255), so that a compressor has something to do."""
    pixels = np.asarray(scene.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    noisy = np.clip(pixels + rng.normal(0, 6.0, pixels.shape), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def take_turns(tasks: Mapping[Name, Callable[[], Value]], turns: int) -> dict[Name, list[Value]]:
    """Call every task once in each turn, the order reversed from turn to turn, so that a drift of
    the machine favours none; returns their answers in the order of the turns."""
    found: dict[Name, list[Value]] = {name: [] for name in tasks}
    for turn in range(turns):
        for name in reversed(found) if turn % 2 else found:
            found[name].append(tasks[name]())
    return found


def seconds_of(task: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> float:
    """Time one call, seconds; `wait` waits until the device has done what it was told."""
    wait()
    began = time.perf_counter()
    task()
    wait()
    return time.perf_counter() - began


def waiting_for(device: torch.device) -> Callable[[], Any]:
    """Give what waits until a device has done what it was told; a CPU already has."""
    import torch

    return torch.accelerator.synchronize if device.type != "cpu" else lambda: None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Give median, quartiles, least and largest of a sample, and its size."""
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
    """Give the spread of turn-by-turn quotients: what drifts within a run cancels in each."""
    return spread([a / b for a, b in zip(values, baseline, strict=True)])


def quartiles(of: Mapping[str, Any], form: str) -> str:
    """Write a spread's quartiles as "a-b"."""
    return f"{of['quartile_1']:{form}}-{of['quartile_3']:{form}}"


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    print_grid([[str(cell) for cell in row] for row in (head, *rows)])


def machine() -> dict[str, Any]:
    """Describe processor, cores, memory in GiB and GPUs; nothing that names the machine."""
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


def check_out(path: Path) -> None:
    """Refuse an --out that cannot be written, before anything is measured.

    Raises:
        UserError: it is a directory, or its own cannot be made or written to.
    """
    if path.is_dir():
        raise UserError(f"--out: {path} is a directory; give a file, such as {path}/figures.json")
    check_directory(path.parent, "--out")


def about(program: str) -> dict[str, Any]:
    """Describe a benchmark's results: the machine, the command, the date and the versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "benchmark": program,
        "command": shlex.join(["python", f"scripts/bench/{program}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions,
    }


def write_result(out: Path, program: str, results: dict[str, Any]) -> None:
    """Write `results` as JSON, with what they are about."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**about(program), **results})
    print(f"wrote {out}")


class Worker:
    """A process that does one thing each time it is told to, and answers with a line of JSON.

    Every method raises a UserError with the last line of its standard error where it has ended.
    """

    def __init__(self, name: str, argv: Sequence[Any], environment: dict[str, str] | None = None):
        """Start `python argv...`."""
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
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    def ready(self) -> dict[str, Any]:
        """Wait until it has built what it needs; returns what it says of it."""
        return self.finish_turn()

    def turn(self) -> dict[str, Any]:
        """Have it do its thing once; returns its answer."""
        self.start_turn()
        return self.finish_turn()

    def start_turn(self) -> None:
        """Tell it to begin: workers that depend on each other are all told before one is waited
        for."""
        try:
            self._input.write("\n")
            self._input.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def finish_turn(self) -> dict[str, Any]:
        """Wait for its answer."""
        for line in self._output:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise self._failure()

    def _failure(self) -> UserError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        return UserError(f"{self.name} ended with exit code {code}: {lines[-1]}")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for file in (self._input, self._output, self._errors):
            file.close()


def answer(value: dict[str, Any]) -> None:
    """Answer a `Worker`'s turn: print one line of JSON."""
    print(json.dumps(value), flush=True)

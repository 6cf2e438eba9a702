"""Running the project's programs: in this process, in a forked one that can be killed, or as
programs."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo.common.cli import as_argv

REPO = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIMING = ("seconds", "pairs_per_s", "peak_memory_gib")
# Both ways of writing a step: 4 pairs of one process or 2 of each of two.
FLAGS = {
    "gradient_accumulation_steps": 2,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "use_winner_preserving": True,
    "winner_preserving_scope": "pair",
    # Adam divides a gradient by its size: rounding would be blown up to a full step where it is
    # close to zero, were epsilon not larger than such gradients.
    "adam_epsilon": 1e-3,
    "learning_rate": 1e-3,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 2,
}


@dataclass(frozen=True)
class Run:
    """What a run left in its output directory."""

    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The metrics without those that depend on the machine's mood, and without nesting."""
        return [{k: v for k, v in flat(entry).items() if k not in TIMING} for entry in self.metrics]

    def column(self, name: str) -> list[float]:
        return [entry[name] for entry in self.metrics]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.out / "config.json").read_text())

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(p.name.split("-")[1]) for p in self.out.glob("checkpoint-*"))

    def unet(self, step: int | None = None) -> dict[str, torch.Tensor]:
        """unet.pth of a checkpoint, by default the newest."""
        step = self.checkpoints[-1] if step is None else step
        return torch.load(self.out / f"checkpoint-{step}" / "unet.pth", weights_only=True)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """One level, without what is null: {"a": {"b": [1, 2]}} as {"a/b/0": 1, "a/b/1": 2}."""
    if not isinstance(value, dict | list):
        return {} if value is None else {name: value}
    result = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        result |= flat(inner, f"{name}/{key}" if name else key)
    return result


def base_unet(model: Path) -> dict[str, torch.Tensor]:
    """The denoiser's weights in a saved pipeline."""
    from safetensors.torch import load_file

    part = "unet" if (model / "unet").is_dir() else "transformer"
    return load_file(model / part / "diffusion_pytorch_model.safetensors")


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def resumed_copy(run: Run, path: Path) -> Path:
    """A run's directory as it was at its last checkpoint but one."""
    shutil.copytree(run.out, path)
    shutil.rmtree(path / f"checkpoint-{run.checkpoints[-1]}")
    return path


def check_close(run: Run, other: Run, base: dict[str, torch.Tensor]) -> None:
    """Two runs from `base` trained the same up to rounding."""
    moved = distance(base, other.unet())
    assert moved > 5e-5
    assert distance(run.unet(), other.unet()) < 0.01 * moved
    for entry, expected in zip(run.numbers, other.numbers, strict=True):
        assert entry == pytest.approx(expected, rel=2e-3, abs=2e-6)


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, to check that nothing of it was touched."""
    paths = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


def program(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end from the repository's root."""
    command = [str(a) for a in arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, **kwargs)


def _reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def _main_of(name: str) -> Callable[[], int]:
    """`main` of a program named by its path, e.g. "eval/score.py"."""
    main = import_module(name.removesuffix(".py").replace("/", ".")).main
    return partial(_call, main) if signature(main).parameters else main


def _call(main: Callable[[list[str]], int]) -> int:
    return main(sys.argv[1:])


def run_here(name: str, argv: Sequence[Any]) -> int:
    """A program in this process; returns its exit code, raises its `UserError`."""
    main = _main_of(name)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    saved_argv, sys.argv = sys.argv, [Path(name).name, *map(str, argv)]
    _reset_accelerate()
    try:
        with redirect_stderr(io.StringIO()):
            return main()
    finally:
        sys.argv = saved_argv
        _reset_accelerate()
        for number, handler in before.items():
            signal.signal(number, handler)


# A server that has imported the heavy modules once; each run is a fork of it, so that it is a
# process of its own (exit code, signals, standard error) without the seconds of importing.
_FORKS = multiprocessing.get_context("forkserver")
_PRELOAD = f"{__package__}.preload"
_FORKS.set_forkserver_preload([_PRELOAD])


def _start_server() -> None:
    """Start the server unless it runs. It finds modules by PYTHONPATH alone, and passes over one to
    preload that it does not find."""
    before = os.environ["PYTHONPATH"]
    os.environ["PYTHONPATH"] = os.pathsep.join([before, str(REPO / "tests")])
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = before


def _child(name: str, argv: list[str], environment: dict[str, str], stderr: str) -> None:
    from sdpo.common.errors import run_main

    assert _PRELOAD in sys.modules, "every run would import everything again"
    # A group of its own, so that a kill takes data workers along; they are forked, as they are
    # where train.py runs as a program.
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(REPO)
    os.environ.update(environment)
    with open(stderr, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    sys.argv = [Path(name).name, *argv]
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    run_main(_main_of(name), Path(name).name)


class Forked:
    """A program, by default train.py, in a process of its own."""

    def __init__(
        self,
        argv: Sequence[Any],
        stderr: Path,
        environment: dict[str, str] | None = None,
        name: str = "train.py",
    ):
        _start_server()
        self.name, self.stderr_file = name, stderr
        arguments = (name, [str(a) for a in argv], environment or {}, str(stderr))
        self.process = _FORKS.Process(target=_child, args=arguments)
        self.process.start()

    def wait(self) -> int:
        """The exit code (minus the signal's number where one killed it)."""
        self.process.join(240)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"{self.name} did not end:\n{self.stderr}")
        return self.process.exitcode

    def kill(self) -> None:
        """End it, and its data workers, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def send_at_step(self, number: int, out: Path, step: int, delay: float = 0.0) -> int:
        """Send a signal once metrics.jsonl holds `step`, and `delay` seconds later; returns the
        exit code."""
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while self.process.is_alive() and time.monotonic() < deadline:
            if metrics.is_file() and f'"step": {step},' in metrics.read_text():
                time.sleep(delay)
                if number == signal.SIGKILL:
                    self.kill()
                elif self.process.is_alive():
                    os.kill(self.process.pid, number)
                break
            time.sleep(0.005)
        return self.wait()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()


def generation_argv(base: Path, suite: Path, out: Path, *more: Any) -> list[str]:
    """generate.py's flags for tiny images of a base model; what is given comes last and wins."""
    flags = {"unet": "base", "pretrained_model_name_or_path": base, "suites": suite}
    flags |= {"resolution": 32, "steps": 2, "batch_size": 2, "outdir": out}
    return [*as_argv(flags), *map(str, more)]


def rank_environments(count: int) -> list[dict[str, str]]:
    """What a launcher tells each of `count` processes on this machine."""
    port = str(free_port())
    return [
        {
            "ACCELERATE_USE_CPU": "true",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        for rank in range(count)
    ]


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Trainer:
    """Runs train.py with tiny defaults; keyword arguments are flags and win over them."""

    def __init__(self, models: dict[str, Path], pairs: Path, cache: Path, scratch: Path) -> None:
        self.models, self.pairs, self.cache, self.scratch = models, pairs, cache, scratch
        self._stderr = 0

    def argv(self, out: Path, **flags: Any) -> list[str]:
        """The command line's flags."""
        data = {} if "dataset_name" in flags else {"train_data_dir": self.pairs}
        steps = {} if "num_train_epochs" in flags else {"max_train_steps": 3}
        return as_argv(
            {
                "pretrained_model_name_or_path": self.models[
                    "sdxl" if flags.get("sdxl") else "sd15"
                ],
                **data,
                **steps,
                "resolution": 32,
                "train_batch_size": 2,
                "learning_rate": 1e-4,
                "lr_warmup_steps": 0,
                "report_to": "none",
                "cache_dir": self.cache,
                "output_dir": out,
                **flags,
            }
        )

    def __call__(self, out: Path, **flags: Any) -> Run:
        """Train in this process, to the end."""
        assert run_here("train.py", self.argv(out, **flags)) == 0
        return Run(out)

    def fork(self, out: Path, environment: dict[str, str] | None = None, **flags: Any) -> Forked:
        """Start training in a process of its own."""
        self._stderr += 1
        stderr = self.scratch / f"stderr-{self._stderr}"
        return Forked(self.argv(out, **flags), stderr, environment)

    def start_processes(
        self,
        out: Path | list[Path],
        count: int,
        environment: dict[str, str] | None = None,
        **flags: Any,
    ) -> list[Forked]:
        """Start training in `count` processes, as a launcher does that adds `environment`; a list
        gives each its `out`."""
        ranks = []
        for rank, own_environment in enumerate(rank_environments(count)):
            own = out[rank] if isinstance(out, list) else out
            ranks.append(self.fork(own, {**own_environment, **(environment or {})}, **flags))
        return ranks

    def processes(
        self, out: Path, count: int, environment: dict[str, str] | None = None, **flags: Any
    ) -> Run:
        """Train in `count` processes, to the end."""
        ranks = self.start_processes(out, count, environment, **flags)
        codes = [fork.wait() for fork in ranks]
        assert codes == [0] * count, "\n".join(fork.stderr for fork in ranks)
        return Run(out)

    def run(self, out: Path) -> Run:
        """What is in an output directory."""
        return Run(out)

    def fails(self, out: Path, **flags: Any) -> str:
        """Train in a process of its own, which must end with exit code 2 and one sentence as the
        last line on standard error, without a traceback; returns that line."""
        fork = self.fork(out, **flags)
        assert fork.wait() == 2, fork.stderr
        return last_sentence(fork.stderr)


def last_sentence(stderr: str, name: str = "train.py") -> str:
    """The last line of `stderr`, checked to be a program's sentence."""
    assert "Traceback" not in stderr, stderr
    line = stderr.strip().splitlines()[-1]
    # A progress bar may stand before it on a line of its own, ended by its own newline.
    assert line.startswith(f"{name}: error: "), stderr
    return line

"""What one card does: is it right, how fast, in how much memory; one command, at most nine minutes.

    bash scripts/bench/gpu.sh            # one card of 40 GB or more
    bash scripts/bench/gpu.sh --tiny     # tiny models, on a CPU too: is the script itself right?
    bash scripts/bench/gpu.sh --base DIR # steps of this base instead, one pair at a time

Nothing is installed or downloaded, and weights are random. First the tests marked `gpu` are run,
which hold this machine's accelerator against float64 and float32 on the CPU; then steps are timed
of SD1.5 at 512 px (4 pairs) and SDXL at 1024 px (one pair, Adafactor, gradient checkpointing) in
bf16, each variant in this process after the other, against a step in the manner of the first public
code and a bare loop. The floating-point operations of a step are counted by torch as it runs, and
set against what the card reaches in a large matrix product. Computed memory is
scripts/bench/memory.py's. What the limit leaves no time for is listed as cut. Results are in --out:
gpu.json, gpu.md and, of the tests, tests.txt.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import common, step
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, first_line, run_main
from sdpo.common.files import make_directory
from sdpo.common.flags import ABOVE_ZERO, flag, parse
from sdpo.config import parse_train

if TYPE_CHECKING:
    import torch

WARM_UP, LEAST = 2, 3  # steps that are not counted, and the fewest that are
TESTS_SHARE = 0.4  # of the whole time, at most
RESERVE = 20  # seconds at a scene's end, for the safeguard and what is computed
LORA, COMPILED, CACHED = "lora", "compile", f"cache+{step.REFERENCE}"


@dataclass(frozen=True)
class Scene:
    """A base, how it is trained, and the variants of its step, the most telling first."""

    name: str
    base: str
    argv: tuple[str, ...]  # step.py's
    variants: tuple[str, ...]
    latent_side: int
    prefix: str = ""  # of every variant's name


SCENES = (
    Scene(
        "SD1.5, 512 px, 4 pairs, AdamW",
        "sd15",
        ("--resolution", "512", "--batch", "4"),
        (
            *(step.PLAIN, step.PUBLIC, step.BARE, CACHED, LORA, "no_safeguard", "lora_4bit"),
            *(COMPILED, "channels_last", "unfused", "cache", step.REFERENCE, "example+lora"),
        ),
        64,
    ),
    Scene(
        "SDXL, 1024 px, 1 pair, Adafactor, gradient checkpointing",
        "sdxl",
        ("--resolution", "1024", "--batch", "1", "--gradient_checkpointing"),
        (
            *(step.PLAIN, step.PUBLIC, LORA, CACHED, "lora_4bit", "no_safeguard"),
            *("lora_8bit", "cache", step.REFERENCE, "channels_last", COMPILED),
        ),
        128,
        prefix="adafactor+",
    ),
)
TINY = Scene(
    "tiny SD1.5, 64 px, 2 pairs, AdamW",
    "assets/tiny-sd15",
    ("--batch", "2"),
    (step.PLAIN, step.PUBLIC, step.BARE, CACHED, LORA),
    16,
)


@dataclass(frozen=True)
class Options:
    """The program's flags."""

    tiny: bool = flag(False, "tiny models and few steps; runs without a card")
    base: str | None = flag(
        None,
        "time this one's steps, a directory in diffusers layout, sd15 or sdxl",
        metavar="BASE",
        shown="SD1.5 and SDXL",
    )
    minutes: float = flag(9.0, "limit of the whole", metavar="N", check=ABOVE_ZERO)
    parts: tuple[str, ...] = flag(
        ("tests", "speed"), "of the whole", choices=("tests", "speed"), shown="both"
    )
    tests: tuple[str, ...] = flag(
        (), "tests to run", metavar="TEST", shown="all that are marked gpu"
    )
    out: Path = flag(Path("output/bench/gpu"), "directory of the results", record=False)


def scenes_of(options: Options) -> tuple[Scene, ...]:
    """Choose what is timed.

    Raises:
        UserError: there is no such --base.
    """
    if options.base is None:
        return (TINY,) if options.tiny else SCENES
    argv = ("--batch", "1", *(() if options.tiny else ("--gradient_checkpointing",)))
    pixels = step.parse_options(["--base", options.base, *argv]).resolution
    size = f"{pixels} px" if pixels else "the base's own size"
    name = f"{options.base}, {size}, 1 pair, AdamW"
    variants = (step.PLAIN, CACHED, LORA, "no_safeguard", "lora_4bit", "cache", step.REFERENCE)
    return (Scene(name, options.base, argv, variants, latent_side=(pixels or 1024) // 8),)


class Clock:
    """What is left of `whole` seconds."""

    def __init__(self, whole: float) -> None:
        self.whole = whole
        self._end = time.monotonic() + whole

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()


def find_device(tiny: bool) -> torch.device:
    """Find the accelerator of this machine.

    Raises:
        UserError: there is none.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None and not tiny:
        raise UserError("there is no accelerator here; --tiny runs tiny models on the CPU")
    return found or torch.device("cpu")


def run_tests(options: Options, device: torch.device, limit: float) -> dict[str, Any]:
    """Run the tests marked `gpu`; returns counts, and which failed. No exit code: time ran out."""
    if find_spec("pytest") is None:
        return {"left_out": "pytest is not installed"}
    # Those of losses before those of runs, of which the last take longest.
    files = sorted((common.ROOT / "tests").rglob("test_*.py"), reverse=True)
    marked = [str(f) for f in files if "pytest.mark.gpu" in f.read_text(encoding="utf-8")]
    argv = [sys.executable, "-m", "pytest", "-vv", "-m", "gpu", "-p", "no:cacheprovider"]
    output = options.out / "tests.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [*argv, *(options.tests or marked)],
            cwd=common.ROOT,
            env={**os.environ, "SDPO_TEST_DEVICE": device.type, "COLUMNS": "200"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"exit_code": code, **read_tests(output.read_text(encoding="utf-8", errors="replace"))}


def read_tests(text: str) -> dict[str, Any]:
    """Read pytest's verbose output: how many passed and were skipped, and which failed."""
    found = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    outcome = dict(found)
    count = list(outcome.values()).count
    failed = [name for name, said in outcome.items() if said in ("FAILED", "ERROR")]
    return {"passed": count("PASSED"), "skipped": count("SKIPPED"), "failed": failed}


def matrix_peak(device: torch.device, side: int) -> float:
    """Measure FLOP/s of a product of two square matrices in bf16, the best of ten."""
    import torch

    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    wait = common.waiting_for(device)
    seconds = [common.seconds_of(lambda: a @ b, wait) for _ in range(12)][2:]
    return 2 * side**3 / min(seconds)


class Steps:
    """Times the variants of a scene, one after the other in this process."""

    def __init__(self, scene: Scene, work: Path, device: torch.device, tiny: bool) -> None:
        work.mkdir()
        self.scene, self.device = scene, device
        self.most, self.seconds = (LEAST, 5.0) if tiny else (12, 6.0)
        steps = str(WARM_UP + self.most)  # and one whose FLOPs are counted
        argv = ["--base", scene.base, "--steps", steps, "--variants", step.PLAIN, *scene.argv]
        self.bench = step.Bench(step.parse_options(argv), work)

    def measure(self, variant: str) -> dict[str, Any]:
        """Time a variant's steps; returns their spread, pairs a second, peak memory in GiB and the
        FLOPs of one.

        Raises:
            UserError: a package that it needs is missing.
        """
        whole = self.scene.prefix + variant
        flags = self.bench.flags(whole, whole)
        if step.REFERENCE in variant.split("+"):
            # A run finds what another of the same length left.
            list(self._take(self.bench.flags(whole, f"{whole}-before"), variant, whole=True))
        *timed, counted = self._take(flags, variant)
        seconds = [entry["seconds"] for entry in timed[WARM_UP:]]
        spread = common.spread(seconds)
        return {
            "seconds": spread,
            "pairs_per_s": self.bench.options.batch / spread["median"],
            "peak_memory_gib": timed[-1]["peak_memory_gib"],
            "flops": counted["flops"],
        }

    def _take(
        self, flags: dict[str, Any], variant: str, whole: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Give the entries of a run's steps, of as many as there is time for unless it is to go to
        its end; the last one has its FLOPs and no telling time."""
        from torch.utils.flop_counter import FlopCounterMode

        from scripts.bench.training import STYLES, open_run

        start_anew(self.device)
        run = open_run(parse_train(as_argv(flags)))
        take = STYLES[step.style_of(variant)](run)
        steps, began = run.steps(), 0.0
        for number in range(WARM_UP + self.most):
            if number == WARM_UP:
                forget_peak(self.device)  # of encoding for a cache, and of the first steps
                began = time.monotonic()
            enough = number >= WARM_UP + LEAST and time.monotonic() - began > self.seconds
            if enough and not whole:
                break
            one = next(steps)
            take(one)
            run.after(one)
            yield one.entry
        counter = FlopCounterMode(display=False)
        # A compiled step computes what a plain one does, and is not looked into.
        with nullcontext() if COMPILED in variant.split("+") else counter:
            take(one := next(steps))
        run.after(one)
        yield {"flops": counter.get_total_flops() or None}


def forget_peak(device: torch.device) -> None:
    """Count the peak of memory from here on, where the device counts one."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def start_anew(device: torch.device) -> None:
    """Let go of the run before: its signals, accelerate's state, what was compiled, its memory."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def computed_gib(scene: Scene, variant: str, pairs: int) -> float | None:
    """Compute a variant's peak memory, GiB, by scripts/bench/memory.py; None where that says
    nothing of it."""
    from scripts.bench import memory

    parts = variant.split("+")
    if scene.base not in memory.BASES or step.style_of(variant) != "own":
        return None
    rank = memory.RANK if LORA in variant else None
    bits = {"lora_8bit": 8, "lora_4bit": 4}.get(variant, 16)
    optimizer = "Adafactor" if "adafactor" in scene.prefix else "AdamW"
    checkpointing = "--gradient_checkpointing" in scene.argv
    counted, activations = counted_base(scene.base, rank, pairs, checkpointing)
    setting = memory.Setting(scene.base, optimizer, pairs, checkpointing, rank, bits)
    found = dict(
        zip(memory.PARTS, memory.bytes_by_part(counted, setting, activations), strict=True)
    )
    found["frozen"] *= "cache" not in parts
    found["ref."] *= step.REFERENCE not in parts
    return sum(found.values()) / memory.GIB


@lru_cache
def counted_base(base: str, rank: int | None, pairs: int, checkpointing: bool) -> tuple[Any, int]:
    """Count a base's numbers and the bytes of its activations, which takes seconds."""
    from scripts.bench import memory

    counted = memory.Counted(base, rank)
    return counted, counted.activations(pairs, checkpointing)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End what is done within it after so many seconds.

    Raises:
        TimeoutError: it was ended.
    """

    def end(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def time_scene(
    scene: Scene, work: Path, device: torch.device, tiny: bool, clock: Clock
) -> dict[str, Any]:
    """Time a scene's variants until the time is used; the safeguard's cost is added."""
    began = time.monotonic()
    steps = Steps(scene, work, device, tiny)
    print(f"{scene.name} (base: {time.monotonic() - began:.0f} s)", flush=True)
    found: dict[str, Any] = {}
    failed, left_out, cut, longest = {}, {}, [], 0.0
    for variant in scene.variants:
        # Compiling takes minutes, a reference's errors a run before.
        factor = 4.0 if COMPILED in variant else 2.0 if step.REFERENCE in variant else 1.2
        if clock.left < factor * longest + RESERVE:
            cut.append(variant)
            continue
        began = time.monotonic()
        try:
            with limited(clock.left):
                found[variant] = steps.measure(variant)
        except TimeoutError:
            cut.append(variant)
            continue
        except UserError as error:  # what it needs is not installed
            left_out[variant] = str(error)
            continue
        except Exception as error:  # one variant's fault is told, and the others are timed
            failed[variant] = f"{type(error).__name__}: {first_line(error)}"
            print(f"  {variant}: {failed[variant]}", flush=True)
            continue
        took = time.monotonic() - began
        if COMPILED not in variant and step.REFERENCE not in variant:
            longest = max(longest, took)
        median = found[variant]["seconds"]["median"]
        print(f"  {variant}: {median:.3f} s a step ({took:.0f} s)", flush=True)
    pairs = steps.bench.options.batch or 1
    for variant, entry in found.items():
        entry["flops"] = entry["flops"] or found.get(step.PLAIN, entry)["flops"]
        entry["flops_per_s"] = (entry["flops"] or 0) / entry["seconds"]["median"]
        entry["computed_gib"] = computed_gib(scene, variant, pairs)
        for base in step.BASELINES:
            if base in found:
                ratio = entry["seconds"]["median"] / found[base]["seconds"]["median"]
                entry[f"time_to_{base}"] = ratio
    start_anew(device)
    rule = rule_seconds(pairs, scene.latent_side, device)
    told = {"failed": failed, "left_out": left_out, "cut": cut}
    return {"variants": found, **told, "safeguard_seconds": rule}


def rule_seconds(pairs: int, side: int, device: torch.device) -> dict[str, float]:
    """Time the safeguard's own computation in either scope, seconds."""
    from scripts.bench import safeguard

    tasks = safeguard.loss_tasks("diffusion-dpo", pairs, side, device)
    only = {name: task for name, task in tasks.items() if name.startswith("rule")}
    taken = safeguard.time_in_turns(only, 50, device)
    return {name.removeprefix("rule "): statistics.median(all_) for name, all_ in taken.items()}


def markdown(about: dict[str, Any], result: dict[str, Any]) -> str:
    """Write the results as a page."""
    peak = result.get("matrix_peak")
    lines = [f"# {about['device']}", "", f"`{about['command']}`, {about['date']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in about["versions"].items()) + ".", ""]
    if tests := result.get("tests"):
        lines += ["## Tests", ""]
        if "left_out" in tests:
            lines += [f"Left out: {tests['left_out']}.", ""]
        else:
            ended = "" if tests["exit_code"] is not None else "; cut off by the time limit"
            lines += [
                f"{tests['passed']} passed, {tests['skipped']} skipped, "
                f"{len(tests['failed'])} failed{ended}.",
                "",
                *(f"- failed: `{name}`" for name in tests["failed"]),
                "",
            ]
    if peak:
        lines += [f"A large matrix product in bf16 reaches {peak / 1e12:.1f} TFLOP/s.", ""]
    for name, scene in result.get("scenes", {}).items():
        lines += [f"## {name}", ""]
        head = ["variant", *(f"time / {base}" for base in step.BASELINES), "s a step", "pairs/s"]
        head += ["peak GiB", "computed GiB", "TFLOP/s", "of the peak"]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for variant, entry in scene["variants"].items():
            ratios = [entry.get(f"time_to_{base}") for base in step.BASELINES]
            computed = entry["computed_gib"]
            cells = [variant, *("" if r is None else f"{r:.2f}" for r in ratios)]
            cells += [f"{entry['seconds']['median']:.3f}", f"{entry['pairs_per_s']:.2f}"]
            cells += [
                f"{entry['peak_memory_gib']:.1f}",
                "" if computed is None else f"{computed:.1f}",
            ]
            speed = entry["flops_per_s"]
            cells += [f"{speed / 1e12:.1f}", f"{speed / peak:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        if plain := scene["variants"].get(step.PLAIN):
            for scope, seconds in scene["safeguard_seconds"].items():
                share = seconds / plain["seconds"]["median"]
                lines.append(
                    f"- The safeguard's rule, scope {scope}: {1e6 * seconds:.0f} microseconds, "
                    f"{share:.4%} of a plain step."
                )
        lines += [f"- {variant} failed: {said}" for variant, said in scene["failed"].items()]
        lines += [f"- {variant} left out: {said}" for variant, said in scene["left_out"].items()]
        if scene["cut"]:
            lines.append(f"- Cut by the time limit: {', '.join(scene['cut'])}.")
        lines.append("")
    return "\n".join(lines)


def describe(device: torch.device) -> str:
    """Name the card and its memory."""
    import torch

    if device.type != "cuda":
        return device.type.upper()
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"


def main() -> int:
    """Test, time, write; returns 1 where a test or a variant failed."""
    options = parse(Options, sys.argv[1:], "gpu.py", __doc__)
    scenes = scenes_of(options)
    make_directory(options.out, "--out")
    clock, device = Clock(60 * options.minutes), find_device(options.tiny)
    result: dict[str, Any] = {"device": describe(device)}
    if "tests" in options.parts:
        result["tests"] = run_tests(options, device, TESTS_SHARE * clock.whole)
        print(f"tests: {result['tests']}", flush=True)
    if "speed" in options.parts:
        result["matrix_peak"] = matrix_peak(device, 8192 if device.type != "cpu" else 512)
        result["scenes"] = {}
        with common.scratch() as work:
            for number, scene in enumerate(scenes):
                part = Clock(clock.left / (len(scenes) - number))
                name = scene.base.replace("/", "-")
                found = time_scene(scene, work / name, device, options.tiny, part)
                result["scenes"][scene.name] = found
    result["seconds"] = clock.whole - clock.left
    about = common.write_result(options.out / "gpu.json", "gpu.py", result)
    page = markdown({**about, "device": result["device"]}, result)
    (options.out / "gpu.md").write_text(page, encoding="utf-8")
    print(page)
    failed = result.get("tests", {}).get("failed") or any(
        scene["failed"] for scene in result.get("scenes", {}).values()
    )
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, "gpu.py")

"""What one card does: is it right, how fast, in how much memory; one command, at most nine minutes.

    bash scripts/bench/gpu.sh            # one card of 40 GB or more
    bash scripts/bench/gpu.sh --tiny     # tiny models, on a CPU too: is the script itself right?
    bash scripts/bench/gpu.sh --base DIR # steps of this base instead, one pair at a time
    bash scripts/bench/gpu.sh --parts speed --variants compile  # what the limit cut before

Nothing is installed or downloaded, and weights are random. First the tests marked `gpu` are run,
which hold this machine's accelerator against float64 and float32 on the CPU; meanwhile the random
bases are written, 9 GB in TMPDIR. Then steps are timed of SD1.5 at 512 px (4 pairs) and SDXL at
1024 px (one pair, Adafactor, gradient checkpointing) in bf16, each variant in this process after
the other, against a step in the manner of the first public code and a bare loop. The floating-point
operations of a step are counted by torch as it runs, and set against what the card reaches in a
large matrix product. Computed memory is scripts/bench/memory.py's. What the limit leaves no time
for is listed as cut. Results are in --out, written anew after the tests and each variant, so that
what ends the program early leaves those before: gpu.json, gpu.md and, of the tests, tests.txt.
"""

from __future__ import annotations

import gc
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import common, step
from scripts.bench.gpu_page import markdown
from scripts.bench.gpu_tests import Tests
from scripts.bench.true_size import WRITTEN, writing
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, first_line, run_main
from sdpo.common.files import make_directory, write_json, write_text
from sdpo.common.flags import ABOVE_ZERO, flag, parse
from sdpo.common.signals import terminable
from sdpo.config import parse_train

if TYPE_CHECKING:
    import torch

WARM_UP, LEAST = 2, 3  # steps that are not counted, and the fewest that are
TESTS_SHARE = 0.4  # of the whole time, at most
RESERVE = 10  # seconds at the end, for the safeguard's own time and what is begun
COMPILING = 100  # seconds, of which with fewer left it is not begun
AGAIN = 5  # seconds after which what did not end at its limit is told so once more
WORKERS = 4  # processes that decode images, as in the recipes
LORA, COMPILED, CACHED = "lora", "compile", f"cache+{step.REFERENCE}"


@dataclass(frozen=True)
class Scene:
    """A base, how it is trained, and the variants of its step, the most telling first; compiling,
    which takes longest, is tried after those of all scenes."""

    name: str
    base: str
    argv: tuple[str, ...]  # step.py's
    variants: tuple[str, ...]
    latent_side: int
    prefix: str = ""  # of every variant's name

    @property
    def pairs(self) -> int:
        """Pairs a step."""
        return int(self.argv[self.argv.index("--batch") + 1])


SCENES = (
    Scene(
        "SD1.5, 512 px, 4 pairs, AdamW",
        "sd15",
        ("--resolution", "512", "--batch", "4"),
        (
            *(step.PLAIN, step.PUBLIC, step.BARE, CACHED, LORA, "no_safeguard", "lora_4bit"),
            *("channels_last", "unfused", "cache", step.REFERENCE, "example+lora", COMPILED),
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
    variants: tuple[str, ...] = flag((), "steps to time", metavar="NAME", shown="all")
    out: Path = flag(Path("output/bench/gpu"), "directory of the results", record=False)


def scenes_of(options: Options) -> tuple[Scene, ...]:
    """Choose what is timed.

    Raises:
        UserError: there is no such --base, or one of --variants in none of its scenes.
    """
    scenes = _scenes(options)
    known = dict.fromkeys(name for scene in scenes for name in scene.variants)
    for name in options.variants:
        if name not in known:
            raise UserError(f"--variants: there is no {name}; there are: {' '.join(known)}")
    if not options.variants:
        return scenes
    kept = {scene: tuple(v for v in scene.variants if v in options.variants) for scene in scenes}
    return tuple(replace(scene, variants=names) for scene, names in kept.items() if names)


def _scenes(options: Options) -> tuple[Scene, ...]:
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


def describe(device: torch.device) -> str:
    """Name the card and its memory."""
    import torch

    if device.type != "cuda":
        return device.type.upper()
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"


class Report:
    """The results, written whenever there are more: as JSON and as a page."""

    def __init__(self, out: Path, device: torch.device) -> None:
        self.out, self.page = out, ""
        self.about = common.about("gpu.py")
        self.result: dict[str, Any] = {"device": describe(device)}

    def add(self, **more: Any) -> None:
        """Add to the results, and write what there is."""
        self.result |= more
        write_json(self.out / "gpu.json", {**self.about, **self.result})
        self.page = markdown(self.about, self.result)
        write_text(self.out / "gpu.md", self.page)

    @property
    def failed(self) -> bool:
        """Whether a test or a variant failed, or the tests ended otherwise than by their end."""
        tests = self.result.get("tests", {})
        scenes = self.result.get("scenes", {}).values()
        bad = tests.get("exit_code") or tests.get("failed")
        return bool(bad) or any(scene["failed"] for scene in scenes)


@contextmanager
def bases_of(scenes: Sequence[Scene], work: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Have the random bases of scenes written below `work`, each under its name by a process of its
    own, which does not outlive the block."""
    names = [scene.base for scene in scenes if scene.base in WRITTEN]
    writers = {
        name: subprocess.Popen(writing(name, work / name), cwd=common.ROOT) for name in names
    }
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.kill()
            writer.wait()


def matrix_peak(device: torch.device, side: int) -> float:
    """Measure FLOP/s of a product of two square matrices in bf16, the best of ten."""
    import torch

    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    wait = common.waiting_for(device)
    seconds = [common.seconds_of(lambda: a @ b, wait) for _ in range(12)][2:]
    return 2 * side**3 / min(seconds)


def nothing_found() -> dict[str, Any]:
    """Give what is told of a scene before any variant was timed."""
    lists: dict[str, Any] = {"cut": []}
    return lists | {name: {} for name in ("variants", "failed", "left_out", "safeguard_seconds")}


class Steps:
    """Times the variants of a scene, one after the other in this process.

    Attributes:
        found: what is told of the scene; see `nothing_found`.
    """

    def __init__(
        self,
        scene: Scene,
        base: Path | str,
        work: Path,
        device: torch.device,
        tiny: bool,
        found: dict[str, Any],
    ) -> None:
        """Prepare the scene in `work`, of which `base` is the model's directory."""
        work.mkdir()
        self.scene, self.device = scene, device
        self.most, self.seconds, self.workers = (LEAST, 5.0, 0) if tiny else (12, 6.0, WORKERS)
        steps = str(WARM_UP + self.most)  # and one whose FLOPs are counted
        argv = ["--base", str(base), "--steps", steps, "--variants", step.PLAIN, *scene.argv]
        self.bench = step.Bench(step.parse_options(argv), work)
        self.took = 0.0  # seconds of the latest variant that was neither compiled nor run twice
        self.found = found

    def take(self, variants: Sequence[str], clock: Clock, keep: Callable[[], None]) -> None:
        """Time variants until the time is used; `keep` is called after each."""
        print(self.scene.name, flush=True)
        for variant in variants:
            parts = variant.split("+")
            # A reference's errors are those of a run before.
            needed = self.took * (2.0 if step.REFERENCE in parts else 1.2)
            if clock.left < (COMPILING if COMPILED in parts else max(1.0, needed)):
                self.found["cut"].append(variant)
                continue
            began = time.monotonic()
            self._try(variant, clock.left)
            took = time.monotonic() - began
            if variant in self.found["variants"]:
                if COMPILED not in parts and step.REFERENCE not in parts:
                    self.took = took
                median = self.found["variants"][variant]["seconds"]["median"]
                print(f"  {variant}: {median:.3f} s a step ({took:.0f} s)", flush=True)
            keep()

    def _try(self, variant: str, limit: float) -> None:
        found = self.found
        try:
            with limited(limit):
                found["variants"][variant] = self.measure(variant)
        except TimeoutError:
            found["cut"].append(variant)
        except UserError as error:  # what it needs is not installed
            found["left_out"][variant] = str(error)
        except Exception as error:  # one variant's fault is told, and the others are timed
            found["failed"][variant] = f"{type(error).__name__}: {first_line(error)}"
            print(f"  {variant}: {found['failed'][variant]}", flush=True)
        self._relate()

    def _relate(self) -> None:
        """Set what was found against the baselines and what is computed."""
        found = self.found["variants"]
        for variant, entry in found.items():
            if COMPILED in variant.split("+"):  # computes what a plain one does
                entry["flops"] = found.get(step.PLAIN, entry)["flops"]
            flops = entry["flops"]
            entry["flops_per_s"] = flops and flops / entry["seconds"]["median"]
            entry["computed_gib"] = computed_gib(self.scene, variant)
            for base in step.BASELINES:
                if base in found:
                    ratio = entry["seconds"]["median"] / found[base]["seconds"]["median"]
                    entry[f"time_to_{base}"] = ratio

    def time_rule(self, limit: float) -> None:
        """Time the safeguard's own computation, so many seconds at most."""
        try:
            with limited(limit):
                start_anew(self.device)
                seconds = rule_seconds(self.scene.pairs, self.scene.latent_side, self.device)
                self.found["safeguard_seconds"] = seconds
        except Exception as error:  # as on a device that a variant left unusable
            said = f"{type(error).__name__}: {first_line(error)}"
            self.found["failed"]["the safeguard's rule"] = said

    def measure(self, variant: str) -> dict[str, Any]:
        """Time a variant's steps; returns their spread, pairs a second, peak memory in GiB and the
        FLOPs of one.

        Raises:
            UserError: a package that it needs is missing.
        """
        whole = self.scene.prefix + variant
        flags = self._flags(whole, whole)
        if step.REFERENCE in variant.split("+"):
            # A run finds what another of the same length left.
            list(self._take(self._flags(whole, f"{whole}-before"), variant, whole=True))
        *timed, counted = self._take(flags, variant)
        seconds = [entry["seconds"] for entry in timed[WARM_UP:]]
        spread = common.spread(seconds)
        return {
            "seconds": spread,
            "pairs_per_s": self.scene.pairs / spread["median"],
            "peak_memory_gib": timed[-1]["peak_memory_gib"],
            "flops": counted["flops"],
        }

    def _flags(self, variant: str, name: str) -> dict[str, Any]:
        flags = self.bench.flags(variant, name)
        return {**flags, "dataloader_num_workers": self.workers}

    def _take(
        self, flags: dict[str, Any], variant: str, whole: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Give the entries of a run's steps, of as many as there is time for unless it is to go to
        its end; the last one has its FLOPs and no telling time.

        Raises:
            KeyboardInterrupt: a signal, which a run takes for a wish to stop, ends the program.
        """
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
            if run.stop:
                raise KeyboardInterrupt
            run.after(one)
            yield one.entry
        counter = FlopCounterMode(display=False)
        try:
            # What is compiled is not looked into.
            with nullcontext() if COMPILED in variant.split("+") else counter:
                take(one := next(steps))
            run.after(one)
        except Exception as error:  # the times are there
            print(f"  {variant}: FLOPs are not counted: {first_line(error)}", flush=True)
            counter.flop_counts.clear()
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until a run takes it
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def computed_gib(scene: Scene, variant: str) -> float | None:
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
    counted, activations = counted_base(scene.base, rank, scene.pairs, checkpointing)
    setting = memory.Setting(scene.base, optimizer, scene.pairs, checkpointing, rank, bits)
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
    ended = False

    def end(*_: Any) -> None:
        nonlocal ended
        ended = True
        raise TimeoutError

    signal.signal(signal.SIGALRM, end)
    # More than once: raised in a callback or a destructor it is passed over.
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds), AGAIN)
    try:
        yield
    except Exception as error:
        if ended:  # a compiler, for one, wraps what is raised within it
            raise TimeoutError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def rule_seconds(pairs: int, side: int, device: torch.device) -> dict[str, float]:
    """Time the safeguard's own computation in either scope, seconds."""
    from scripts.bench import safeguard

    tasks = safeguard.loss_tasks("diffusion-dpo", pairs, side, device)
    only = {name: task for name, task in tasks.items() if name.startswith("rule")}
    taken = safeguard.time_in_turns(only, 50, device)
    return {name.removeprefix("rule "): statistics.median(all_) for name, all_ in taken.items()}


def main() -> int:
    """Test, time, write; returns 1 where a test or a variant failed."""
    options = parse(Options, sys.argv[1:], "gpu.py", __doc__)
    scenes = scenes_of(options)
    if "speed" not in options.parts:
        scenes = ()
    make_directory(options.out, "--out")
    clock, device = Clock(60 * options.minutes - RESERVE), find_device(options.tiny)
    report = Report(options.out, device)
    with terminable(), common.scratch() as work, bases_of(scenes, work) as writers:
        if "tests" in options.parts:
            tests = Tests(options.tests, device.type, options.out / "tests.txt")
            for scene in scenes:  # which takes seconds on the CPU
                for variant in scene.variants:
                    computed_gib(scene, variant)
            share = TESTS_SHARE * clock.whole
            report.add(tests=tests.finish(share - (clock.whole - clock.left)))
            print(report.page, flush=True)
        if scenes:
            time_scenes(scenes, work, writers, device, options.tiny, clock, report)
    report.add(seconds=clock.whole - clock.left)
    print(report.page)
    return 1 if report.failed else 0


def time_scenes(
    scenes: Sequence[Scene],
    work: Path,
    writers: dict[str, subprocess.Popen[bytes]],
    device: torch.device,
    tiny: bool,
    clock: Clock,
    report: Report,
) -> None:
    """Time the scenes, whose bases `writers` write into `work`."""
    for writer in writers.values():
        with suppress(subprocess.TimeoutExpired):
            writer.wait(max(0.0, clock.left))
    report.add(matrix_peak=matrix_peak(device, 8192 if device.type != "cpu" else 512), scenes={})
    ready = []
    for scene in scenes:
        found = report.result["scenes"][scene.name] = nothing_found()
        writer = writers.get(scene.base)
        if writer and writer.poll() is None:
            found["cut"] += scene.variants
        elif writer and writer.returncode:
            found["failed"]["its base"] = f"writing it ended with exit code {writer.returncode}"
        else:
            base = work / scene.base if writer else scene.base
            apart = work / f"scene-{len(ready)}"
            ready.append(Steps(scene, base, apart, device, tiny, found))
    for number, steps in enumerate(ready):
        part = Clock(clock.left / (len(ready) - number))
        ordinary = [name for name in steps.scene.variants if COMPILED not in name.split("+")]
        steps.take(ordinary, part, report.add)
        steps.time_rule(RESERVE)
        report.add()
    for steps in ready:
        compiled = [name for name in steps.scene.variants if COMPILED in name.split("+")]
        steps.take(compiled, clock, report.add)


if __name__ == "__main__":
    run_main(main, "gpu.py")

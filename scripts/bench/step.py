"""Time per optimizer step and peak memory: train.py plain, with each option, and against a step in
the manner of the first public code (`public`), a bare loop of the same mathematics (`bare`) and
a LoRA step in the manner of diffusers' example (`example+lora`).

    bash scripts/bench/step.sh                                     # the tiny model of assets/
    bash scripts/bench/step.sh --base assets/tiny-sd3
    bash scripts/bench/step.sh --base sd15 --resolution 256 --variants public cache cache+lora
    bash scripts/bench/step.sh --base sdxl                         # 1024 px, for a GPU

Every variant is train.py's parts under its own flags in a fresh process, random weights where the
base is a name and no directory. Variants of small bases are all alive and take one step each in
turn, forwards and backwards; larger ones run one after another for --steps steps, in --rounds
rounds whose order is reversed each time. Ratios are taken turn by turn, so that a machine's drift
cancels. The first step of a process (allocation, compilation) is not counted.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.bench import common
from scripts.bench.true_size import WRITTEN, write_pipeline_apart
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, flat, parse

PLAIN, PUBLIC, BARE, EXAMPLE = "plain", "public", "bare", "example"
REFERENCE = "reference_cache"
# What ratios are taken to.
BASELINES = (PLAIN, PUBLIC, BARE, f"{EXAMPLE}+lora")
# The flags of train.py that each part of a variant's name stands for.
PARTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    PUBLIC: {},
    BARE: {},
    EXAMPLE: {},
    "cache": {},  # its directory is the benchmark's
    REFERENCE: {},  # as is this one's, which another run has filled
    "lora": {"lora_rank": 16},
    "lora_8bit": {"lora_rank": 16, "quantize_base": "8bit"},
    "lora_4bit": {"lora_rank": 16, "quantize_base": "4bit"},
    "checkpointing": {"gradient_checkpointing": True},
    "channels_last": {"channels_last": True},
    "unfused": {"no-fused_optimizer": True},
    "compile": {"compile": True},
    "8bit_adam": {"use_8bit_adam": True},
    "adafactor": {"use_adafactor": True},
    "ema": {"use_ema": True},
    "offload_reference": {"offload_reference": True},
    "no_safeguard": {"use_winner_preserving": False},
    "parameter": {"winner_preserving_space": "parameter"},
    "pair": {"winner_preserving_scope": "pair"},
}
COMBINED = (
    "cache+lora",
    "cache+lora+checkpointing",
    "cache+checkpointing",
    "cache+channels_last",
    f"{REFERENCE}+checkpointing",
    f"cache+{REFERENCE}",
    "bare+lora",
    "example+lora",
    "parameter+pair",
    "public+checkpointing",
)
VARIANTS = (*PARTS, *COMBINED)
# Compiling takes minutes on a CPU, and moving the reference to the host saves nothing there.
NOT_BY_DEFAULT = ("compile", "offload_reference", "pair", "public+checkpointing", EXAMPLE)
SMALL = 2**28  # bytes of a base on disk, of which many fit in memory at once
ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    base: str = flag(
        "assets/tiny-sd15",
        f"directory of a base, or {' or '.join(WRITTEN)}: random weights at true size",
    )
    resolution: int | None = flag(None, "side of the images", metavar="PX", shown="the base's own")
    batch: int | None = flag(
        None, "pairs", metavar="PAIRS", shown="8 of a small base, else 1", check=ONE
    )
    accumulation: int = flag(1, "micro-steps a step", metavar="N", check=ONE)
    mixed_precision: str | None = flag(
        None, "number format", choices=("no", "fp16", "bf16"), shown="no of a small base, else bf16"
    )
    gradient_checkpointing: bool = flag(False, "in every variant")
    variants: tuple[str, ...] = flag(
        tuple(name for name in VARIANTS if name not in NOT_BY_DEFAULT),
        f"of {' '.join(VARIANTS)}",
        metavar="NAME",
        shown=f"all but {' '.join(NOT_BY_DEFAULT)}",
        record=False,
    )
    rounds: int = flag(1, "fresh processes of each variant", check=ONE)
    steps: int = flag(10, "counted steps of each process", check=ONE)
    pairs: int = flag(64, "rows of the data", check=ONE)
    out: Path = flag(Path("output/bench/step.json"), "the figures", record=False)


def parse_options(argv: list[str]) -> Options:
    """Parse the flags and fill in what depends on the base; the plain variant comes first.

    Raises:
        UserError: naming the flag and what would be right.
    """
    given = parse(Options, argv, "step.py", __doc__)
    for name in given.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants: there is no {name}; there are: {' '.join(VARIANTS)}")
    if given.base not in WRITTEN and not Path(given.base).is_dir():
        raise UserError(
            f"--base: there is no directory {given.base}; give one, or {' or '.join(WRITTEN)}"
        )
    variants = [PLAIN, *(name for name in given.variants if name != PLAIN)]
    if find_spec("bitsandbytes") is None:
        left_out = [name for name in variants if "bit" in name]
        variants = [name for name in variants if name not in left_out]
        if left_out:
            print(f"left out: {' '.join(left_out)} (bitsandbytes is not installed)")
    small = is_small(given.base)
    return replace(
        given,
        batch=given.batch or (8 if small else 1),
        mixed_precision=given.mixed_precision or ("no" if small else "bf16"),
        variants=tuple(variants),
    )


def is_small(base: str) -> bool:
    """Whether many processes can hold the base at once."""
    files = () if base in WRITTEN else Path(base).rglob("*")
    return base not in WRITTEN and sum(f.stat().st_size for f in files) < SMALL


class Bench:
    """The base and the pairs on disk, and the processes that train on them."""

    def __init__(self, options: Options, work: Path) -> None:
        from sdpo.tinyworld.pairs import write_pairs

        self.options, self.work, self.model = options, work, Path(options.base).absolute()
        self.resolution = options.resolution
        self.filled: set[Path] = set()  # directories of the reference's errors
        write_pairs(work / "pairs", options.pairs, 8, 0)
        if options.base in WRITTEN:
            self.model = work / "model"
            write_pipeline_apart(options.base, self.model)

    def flags(self, variant: str, name: str) -> dict[str, Any]:
        """Name the flags of train.py of a variant, for a run in the directory `name`."""
        options = self.options
        flags = common.run_flags(
            self.work,
            name,
            pretrained_model_name_or_path=self.model,
            resolution=options.resolution,
            train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
            mixed_precision=options.mixed_precision,
            use_winner_preserving=True,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        parts = variant.split("+")
        for part in parts:
            flags |= PARTS[part]
        if "cache" in parts:
            flags["cache_dir_latents"] = self.work / "latents"
        if REFERENCE in parts:
            kind = "cache" if "cache" in parts else "images"
            flags["cache_reference"] = self.work / f"errors-{kind}"
            # A run without end would find that some are missing.
            flags["max_train_steps"] = 1 + options.steps
        return flags

    def start(self, variant: str, number: int) -> common.Worker:
        """Start a process of a variant; those that read the reference's errors find them made by
        another."""
        errors = self.flags(variant, "").get("cache_reference")
        if errors and errors not in self.filled:
            self.filled.add(errors)
            with closing(self._start(variant, "filling")) as worker:
                worker.ready()
                for _ in range(1 + self.options.steps):
                    worker.turn()
        return self._start(variant, number)

    def _start(self, variant: str, number: int | str) -> common.Worker:
        argv = as_argv(self.flags(variant, f"{variant}-{number}"))
        program = ["-m", "scripts.bench.training", style_of(variant), *argv]
        return common.Worker(variant, program)


def style_of(variant: str) -> str:
    """Name the way in which a variant's step is written, of `scripts.bench.training.STYLES`."""
    written = (part for part in variant.split("+") if part in (PUBLIC, BARE, EXAMPLE))
    return next(written, "own")


def measure(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Take the counted steps of every variant; returns their entries in the order of the turns."""
    options = bench.options
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for number in range(options.rounds):
        names = options.variants[::-1] if number % 2 else options.variants
        # Larger variants are alone in memory.
        for group in [names] if is_small(options.base) else [(name,) for name in names]:
            with ExitStack() as stack:
                turns = {}
                for name in group:
                    worker = stack.enter_context(closing(bench.start(name, number)))
                    bench.resolution = worker.ready()["resolution"]
                    turns[name] = worker.turn
                for name, entries in common.take_turns(turns, 1 + options.steps).items():
                    found[name] += entries[1:]
            if len(group) == 1:
                median = statistics.median(e["seconds"] for e in entries[1:])
                print(f"  {name}: {median:.2f} s", flush=True)
    return found


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Give seconds, memory and ratios of each variant to each of `BASELINES`."""
    seconds = {name: [e["seconds"] for e in entries] for name, entries in found.items()}
    memory = {name: max(e["peak_memory_gib"] for e in entries) for name, entries in found.items()}
    result = {}
    for name in found:
        entry = {"seconds": common.spread(seconds[name]), "peak_memory_gib": memory[name]}
        for base in found.keys() & set(BASELINES):
            entry[f"time_to_{base}"] = common.ratios(seconds[name], seconds[base])
            entry[f"memory_to_{base}"] = memory[name] / memory[base]
        result[name] = entry
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table, ratios first."""
    head, rows = ["variant"], {name: [name] for name in result}
    for base in BASELINES:
        if base not in result:
            continue
        head += [f"time/{base}", "quartiles", f"mem/{base}"]
        for name, entry in result.items():
            time, memory = entry[f"time_to_{base}"], entry[f"memory_to_{base}"]
            rows[name] += [f"{time['median']:.3f}", common.quartiles(time, ".3f"), f"{memory:.2f}"]
    for name, entry in result.items():
        rows[name] += [f"{entry['seconds']['median']:.4f}", f"{entry['peak_memory_gib']:.2f}"]
    common.print_table([*head, "s/step", "peak GiB"], rows.values())


def main() -> int:
    """Run, print, write."""
    options = parse_options(sys.argv[1:])
    common.check_out(options.out)
    with common.scratch() as work:
        bench = Bench(options, work)
        result = summarise(measure(bench))
        settings = {**flat(options), "resolution": bench.resolution}
    show(result)
    common.write_result(options.out, "step.py", {"settings": settings, "variants": result})
    return 0


if __name__ == "__main__":
    run_main(main, "step.py")

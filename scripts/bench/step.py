"""Time per optimizer step and peak memory: train.py plain, with each option, and a step in the
manner of the first public code.

    bash scripts/bench/step.sh                                     # the tiny model of assets/
    bash scripts/bench/step.sh --size sd15 --resolution 256 --variants public cache cache+lora
    bash scripts/bench/step.sh --size sdxl                         # 1024 px, for a GPU

Every variant is train.py with its own flags in a fresh process, random weights where the size is a
true one. Tiny variants are all alive and take one step each in turn, forwards and backwards; larger
ones run one after another for --steps steps, in --rounds rounds whose order is reversed each time.
Ratios are taken turn by turn, so that a machine's drift cancels. The first step of a process
(allocation, compilation) is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
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
from scripts.bench.train_worker import PUBLIC_STYLE
from sdpo.common.cli import at_least
from sdpo.common.errors import UserError, run_main

PUBLIC = "public"
PLAIN = "plain"
CACHE = ["--cache_dir_latents", "{cache}"]
LORA = ["--lora_rank", "16"]
VARIANTS: dict[str, list[str]] = {
    PLAIN: [],
    PUBLIC: [],
    "cache": CACHE,
    "lora": LORA,
    "cache+lora": [*CACHE, *LORA],
    "cache+lora+checkpointing": [*CACHE, *LORA, "--gradient_checkpointing"],
    "checkpointing": ["--gradient_checkpointing"],
    "public+checkpointing": ["--gradient_checkpointing"],
    "cache+checkpointing": [*CACHE, "--gradient_checkpointing"],
    "channels_last": ["--channels_last"],
    "fused": ["--fused_optimizer"],
    "cache+channels_last+fused": [*CACHE, "--channels_last", "--fused_optimizer"],
    "compile": ["--compile"],
    "8bit_adam": ["--use_8bit_adam"],
    "adafactor": ["--use_adafactor"],
    "ema": ["--use_ema"],
    "offload_reference": ["--offload_reference"],
    "no_safeguard": ["--no-use_winner_preserving"],
    "parameter": ["--winner_preserving_space", "parameter"],
    "parameter+pair": [
        *("--winner_preserving_space", "parameter"),
        *("--winner_preserving_scope", "pair"),
    ],
}
# Compiling takes minutes on a CPU, and moving the reference to the host saves nothing there.
NOT_BY_DEFAULT = ("compile", "offload_reference", "public+checkpointing")
RESOLUTION = {"tiny": 64, "sd15": 512, "sdxl": 1024}


def parse() -> argparse.Namespace:
    """The benchmark's flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    found = parser("step.py", __doc__)
    add = found.add_argument
    add("--size", choices=tuple(RESOLUTION), default="tiny", help="default: tiny")
    add("--resolution", type=int, metavar="PX", help="default: 64, 512 or 1024 by the size")
    add("--batch", type=int, metavar="PAIRS", help="default: 8 tiny, else 1")
    add("--accumulation", type=int, default=1, metavar="N", help="micro-steps a step, default: 1")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: no tiny, else bf16")
    add("--gradient_checkpointing", action="store_true", help="in every variant")
    add("--variants", nargs="+", metavar="NAME", help=f"of {' '.join(VARIANTS)}")
    add("--rounds", type=int, default=1, help="fresh processes of each variant, default: 1")
    add("--steps", type=int, default=10, help="counted steps of each process, default: 10")
    add("--pairs", type=int, default=64, help="rows of the data, default: 64")
    args = found.parse_args()
    at_least(args, 1, "rounds", "steps", "accumulation", "pairs")
    args.resolution = args.resolution or RESOLUTION[args.size]
    args.batch = args.batch or (8 if args.size == "tiny" else 1)
    args.mixed_precision = args.mixed_precision or ("no" if args.size == "tiny" else "bf16")
    for name in args.variants or []:
        if name not in VARIANTS:
            raise UserError(f"--variants: there is no {name}; there are: {' '.join(VARIANTS)}")
    wanted = args.variants or [name for name in VARIANTS if name not in NOT_BY_DEFAULT]
    args.variants = [PLAIN, *(name for name in wanted if name != PLAIN)]
    if "8bit_adam" in args.variants and find_spec("bitsandbytes") is None:
        args.variants.remove("8bit_adam")
        print("left out: 8bit_adam (bitsandbytes is not installed)")
    return args


class Bench:
    """The model and the pairs on disk, and the processes that train on them."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        from sdpo.tinyworld.pairs import write_pairs

        self.args, self.work = args, work
        write_pairs(work / "pairs", args.pairs, 8, 0)
        self.model = TINY_MODEL
        if args.size != "tiny":
            self.model = work / "model"
            # In a process of its own, so that its memory is given back.
            print(f"writing a random {args.size} pipeline", flush=True)
            program = ROOT / "scripts/bench/true_pipeline.py"
            subprocess.run([sys.executable, program, args.size, self.model], check=True, cwd=ROOT)

    def start(self, variant: str, number: int) -> Worker:
        """A fresh process of a variant."""
        args = self.args
        flags = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.work / "pairs",
            "cache_dir": self.work / "datasets",
            "output_dir": self.work / f"{variant}-{number}",
            "resolution": args.resolution,
            "train_batch_size": args.batch,
            "gradient_accumulation_steps": args.accumulation,
            "mixed_precision": args.mixed_precision,
            "max_train_steps": 10**6,
            "checkpointing_steps": 10**6,
            "validation_steps": 10**6,
            "learning_rate": 1e-8,
            "lr_warmup_steps": 0,
            "report_to": "none",
        }
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        argv += ["--use_winner_preserving", *(["--sdxl"] if args.size == "sdxl" else [])]
        argv += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
        argv += [flag.format(cache=self.work / "latents") for flag in VARIANTS[variant]]
        style = [PUBLIC_STYLE] if variant.startswith(PUBLIC) else []
        worker = Worker(variant, [ROOT / "scripts/bench/train_worker.py", *style, *argv])
        worker.ready()
        return worker


def in_turns(bench: Bench, round_number: int) -> dict[str, list[dict[str, Any]]]:
    """All variants alive, one step each in turn."""
    names = bench.args.variants
    workers = {name: bench.start(name, round_number) for name in names}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for turn in range(1 + bench.args.steps):
            for name in names if turn % 2 else reversed(names):
                found[name].append(workers[name].turn())
    finally:
        for worker in workers.values():
            worker.close()
    return found


def one_by_one(bench: Bench, round_number: int) -> dict[str, list[dict[str, Any]]]:
    """Each variant alone in memory, all its steps at once."""
    names = bench.args.variants
    found = {}
    for name in reversed(names) if round_number % 2 else names:
        worker = bench.start(name, round_number)
        try:
            found[name] = [worker.turn() for _ in range(1 + bench.args.steps)]
        finally:
            worker.close()
        median = statistics.median(entry["seconds"] for entry in found[name][1:])
        print(f"  {name}: {median:.2f} s", flush=True)
    return found


def measure(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Entries of the counted steps of every variant, in the order of the turns."""
    collect = in_turns if bench.args.size == "tiny" else one_by_one
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in bench.args.variants}
    for round_number in range(bench.args.rounds):
        for name, entries in collect(bench, round_number).items():
            found[name] += entries[1:]
    return found


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Seconds, memory and ratios of each variant to the plain and the public-style step."""
    seconds = {name: [e["seconds"] for e in entries] for name, entries in found.items()}
    memory = {name: max(e["peak_memory_gib"] for e in entries) for name, entries in found.items()}
    result = {}
    for name in found:
        entry = {"seconds": spread(seconds[name]), "peak_memory_gib": memory[name]}
        for base in (PLAIN, PUBLIC):
            if base in found:
                entry[f"time_to_{base}"] = ratios(seconds[name], seconds[base])
                entry[f"memory_to_{base}"] = memory[name] / memory[base]
        result[name] = entry
    return result


def show(result: dict[str, Any]) -> None:
    """The table, ratios first."""
    head = ["variant"]
    bases = [base for base in (PLAIN, PUBLIC) if base in result]
    for base in bases:
        head += [f"time/{base}", "quartiles", f"mem/{base}"]
    rows = []
    for name, entry in result.items():
        row = [name]
        for base in bases:
            quotient = entry[f"time_to_{base}"]
            row += [
                f"{quotient['median']:.3f}",
                f"{quotient['quartile_1']:.3f}-{quotient['quartile_3']:.3f}",
                f"{entry[f'memory_to_{base}']:.2f}",
            ]
        seconds = entry["seconds"]
        row += [f"{seconds['median']:.4f}", f"{entry['peak_memory_gib']:.2f}"]
        rows.append(row)
    print_table([*head, "s/step", "peak GiB"], rows)


def main() -> int:
    """Run, print, write."""
    args = parse()
    work = Path(tempfile.mkdtemp(prefix="sdpo-bench-"))
    try:
        result = summarise(measure(Bench(args, work)))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(result)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "variants")}
    write_result(args.out, "step.py", {"settings": settings, "variants": result})
    return 0


if __name__ == "__main__":
    run_main(main, "step.py")

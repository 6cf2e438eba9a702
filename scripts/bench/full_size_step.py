"""Two optimizer steps of the real training loop at SD1.5's true size, then the safeguard's cost.

    bash scripts/bench/full_size_step.sh [--resolution 256] [--repeats 5] [--mixed_precision bf16]

Random weights, no hub. Steps with and without the safeguard alternate in one process; their medians
are compared (with the standard error of the difference within a turn), and since steps are noisier
than the rule is expensive, the rule's own computation is also timed alone and given as a share of
the step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import write_json

GIB = 2**30


def parse() -> argparse.Namespace:
    """The benchmark's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind (default: 5)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--out", type=Path, default=Path("output/bench/full_size_step.json"))
    args = parser.parse_args()
    if args.repeats < 1 or args.resolution < 64 or args.resolution % 64:
        raise UserError("--repeats must be at least 1 and --resolution a multiple of 64")
    return args


def check_parameter_counts() -> dict[str, int]:
    """Count both families' parameters on the meta device.

    Raises:
        UserError: one is not what the published models have.
    """
    from true_size import PARAMETERS, count_on_meta

    counts = {family: count_on_meta(family) for family in PARAMETERS}
    for family, count in counts.items():
        print(f"{family}: {count:,} parameters (published: {PARAMETERS[family]:,})")
        if count != PARAMETERS[family]:
            raise UserError(f"{family} builds {count:,} parameters, not {PARAMETERS[family]:,}")
    return counts


def build_trainer(bench: argparse.Namespace, work: Path) -> Any:
    """A `Trainer` as train.py builds it, with full-size random models."""
    import torch
    from accelerate import Accelerator
    from sdpo.training.accumulation import OwnAccumulation
    from true_size import build_sd15_frozen, build_unet

    from sdpo.args import build_parser
    from sdpo.data.loader import PairLoader
    from sdpo.data.order import FIRST
    from sdpo.data.source import open_pairs
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.encoding import ModelEncoder
    from sdpo.models.forward import make_reference
    from sdpo.tinyworld.pairs import write_pairs
    from sdpo.training.checkpoint import Progress
    from sdpo.training.optim import build_optimizer, build_scheduler
    from sdpo.training.run import Trainer
    from sdpo.training.state import Models

    write_pairs(work / "pairs", 64, 8, 0)
    flags = f"""--pretrained_model_name_or_path true-size/random --train_data_dir {work / "pairs"}
        --output_dir {work / "run"} --cache_dir {work / "cache"} --resolution {bench.resolution}
        --train_batch_size 1 --max_train_steps 2 --learning_rate 1e-8 --lr_warmup_steps 0
        --mixed_precision {bench.mixed_precision} --gradient_checkpointing --report_to none
        --winner_preserving_mu 0.9"""
    args = build_parser().parse_args(flags.split())
    (work / "run").mkdir()
    dtype = torch.bfloat16 if bench.mixed_precision == "bf16" else torch.float32
    accelerator = Accelerator(mixed_precision=bench.mixed_precision)
    frozen = build_sd15_frozen().to(accelerator.device, dtype, dtype)
    unet = build_unet("sd15").to(accelerator.device)
    reference = make_reference(unet, dtype)
    unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(unet.parameters(), args, args.learning_rate)
    scheduler = build_scheduler(optimizer, args, args.max_train_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    family = get_family(sdxl=False)
    encoder = ModelEncoder(family, frozen, bench.resolution, accelerator.device)
    models = Models(family, ModelSource("none"), unet, reference, encoder)
    loader = PairLoader(open_pairs(args), args, rank=0, world_size=1)
    start = Progress(0, FIRST)
    accumulation = OwnAccumulation(accelerator, unet, args.max_grad_norm)
    return Trainer(args, accelerator, models, loader, accumulation, optimizer, scheduler, start, 2)


def alternate(trainer: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` steps without and with the safeguard, taken in turns."""
    batches = iter(trainer.loader)
    seconds: dict[str, list[float]] = {"plain": [], "safeguard": []}
    for i in range(repeats):
        # The order within a turn changes too, so that a drift of the machine favours neither.
        for name in sorted(seconds, reverse=bool(i % 2)):
            trainer.args.use_winner_preserving = name == "safeguard"
            seconds[name].append(trainer.step(batches)["seconds"])
            print(f"  {name:>10}: {seconds[name][-1]:7.2f} s")
    return seconds


def rule_seconds(resolution: int, repeats: int = 200) -> float:
    """Median seconds of what the rule adds to a step: scale and gradient scaling, one pair."""
    import torch

    from sdpo import loser_scale, scale_gradient

    side = resolution // 8
    w, l = torch.randn(2, 1, 4, side, side)  # noqa: E741
    error = torch.ones(1, requires_grad=True)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        scale_gradient(error, loser_scale(w, l, 0.9)).sum().backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> int:
    """Run, print a table, write JSON."""
    bench = parse()
    counts = check_parameter_counts()
    from sdpo.common.processes import quieten_libraries
    from sdpo.training.runlog import peak_memory_gib

    quieten_libraries()
    work = Path(tempfile.mkdtemp(prefix="sdpo-bench-"))
    try:
        trainer = build_trainer(bench, work)
        began = time.perf_counter()
        trainer.train()
        two_steps = time.perf_counter() - began
        lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
        print(f"two steps and a checkpoint: {two_steps:.1f} s")
        seconds = alternate(trainer, bench.repeats)
        peak = peak_memory_gib(trainer.device)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    turns = [s - p for s, p in zip(seconds["safeguard"], seconds["plain"], strict=True)]
    error = statistics.stdev(turns) / len(turns) ** 0.5 if len(turns) > 1 else None
    rule = rule_seconds(bench.resolution)
    result = {
        "parameters": counts,
        "resolution": bench.resolution,
        "mixed_precision": bench.mixed_precision,
        "first_steps": [json.loads(line) for line in lines],
        "step_seconds": seconds,
        "median_seconds": medians,
        "overhead_of_medians": medians["safeguard"] / medians["plain"] - 1,
        "overhead_standard_error": None if error is None else error / medians["plain"],
        "rule_seconds": rule,
        "rule_share_of_step": rule / medians["plain"],
        "peak_memory_gib": peak,
    }
    bench.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(bench.out, result)
    print(f"median step: {medians['plain']:.2f} s plain, {medians['safeguard']:.2f} s safeguard")
    noise = "" if error is None else f", give or take {100 * error / medians['plain']:.1f} %"
    print(f"overhead of the medians: {100 * result['overhead_of_medians']:+.2f} %{noise}")
    print(f"the rule alone: {1e3 * rule:.3f} ms, {100 * result['rule_share_of_step']:.4f} % of it")
    print(f"peak memory: {peak:.1f} GiB\nwrote {bench.out}")
    return 0


if __name__ == "__main__":
    run_main(main, "full_size_step")

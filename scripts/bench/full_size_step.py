"""Two optimizer steps of the real training loop at SD1.5's true size, then the safeguard's cost.

    bash scripts/bench/full_size_step.sh [--resolution 256] [--repeats 5] [--mixed_precision bf16]

Random weights, no hub. Steps with and without the safeguard alternate in one process; their medians
are compared (with the standard error of the difference within a turn), and since steps are noisier
than the rule is expensive, the rule's own computation is also timed alone and given as a share of
the step.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.bench import common
from scripts.bench.true_size import PARAMETERS, build_unet, write_pipeline_apart
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, flat, multiple_of, parse
from sdpo.config import TrainConfig, parse_train


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    resolution: int = flag(256, "side of the images", check=(multiple_of(64), at_least(64)))
    repeats: int = flag(5, "steps of each kind", check=at_least(1))
    mixed_precision: str = flag("bf16", "number format", choices=("no", "bf16"))
    out: Path = flag(Path("output/bench/full_size_step.json"), "the figures", record=False)


def check_parameter_counts() -> dict[str, int]:
    """Count both families' parameters on the meta device.

    Raises:
        UserError: one is not what the published models have.
    """
    import torch

    counts = {}
    for family, published in PARAMETERS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in build_unet(family).parameters())
        print(f"{family}: {count:,} parameters (published: {published:,})")
        if count != published:
            raise UserError(f"{family} builds {count:,} parameters, not {published:,}")
        counts[family] = count
    return counts


def settings_of(options: Options, work: Path) -> TrainConfig:
    """Write model and pairs; returns a run's settings, with the safeguard."""
    from sdpo.tinyworld.pairs import write_pairs

    write_pairs(work / "pairs", 64, 8, 0)
    write_pipeline_apart("sd15", work / "model")
    flags = common.run_flags(
        work,
        "run",
        pretrained_model_name_or_path=work / "model",
        resolution=options.resolution,
        mixed_precision=options.mixed_precision,
        gradient_checkpointing=True,
        use_winner_preserving=True,
    )
    return parse_train(as_argv(flags))


def train(config: TrainConfig, repeats: int) -> dict[str, Any]:
    """Take two steps and save, then `repeats` steps of each kind in turn."""
    from scripts.bench.training import TakeStep, open_run, own_step
    from sdpo.training.runlog import peak_memory_gib

    without = replace(config, safeguard=replace(config.safeguard, use_winner_preserving=False))
    run = open_run(config)
    coming = run.steps()
    kinds = {"plain": own_step(without, run), "safeguard": own_step(config, run)}

    def first_steps() -> None:
        for step in islice(coming, 2):
            kinds["plain"](step)
            run.after(step)
            entries.append(step.entry)
        run.save()

    def turn(name: str, take: TakeStep) -> float:
        step = next(coming)
        take(step)
        run.after(step)
        seconds: float = step.entry["seconds"]
        print(f"  {name:>10}: {seconds:7.2f} s", flush=True)
        return seconds

    entries: list[dict[str, Any]] = []
    print(f"two steps and a checkpoint: {common.seconds_of(first_steps):.1f} s")
    turns = {name: partial(turn, name, take) for name, take in kinds.items()}
    seconds = common.take_turns(turns, repeats)
    peak = peak_memory_gib(run.device)
    return {"first_steps": entries, "step_seconds": seconds, "peak_memory_gib": peak}


def rule(resolution: int) -> Callable[[], None]:
    """Make the task of what the rule adds to a step: scale and gradient scaling, one pair."""
    import torch

    from sdpo import loser_scale, scale_gradient

    side = resolution // 8
    winner, loser = torch.randn(2, 1, 4, side, side)
    error = torch.ones(1, requires_grad=True)
    return lambda: scale_gradient(error, loser_scale(winner, loser, 0.9)).sum().backward()


def main() -> int:
    """Run, print a table, write JSON."""
    options = parse(Options, sys.argv[1:], "full_size_step.py", __doc__)
    counts = check_parameter_counts()
    with common.scratch() as work:
        found = train(settings_of(options, work), options.repeats)
    seconds, peak = found["step_seconds"], found["peak_memory_gib"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain = medians["plain"]
    turns = [s - p for s, p in zip(seconds["safeguard"], seconds["plain"], strict=True)]
    error = statistics.stdev(turns) / len(turns) ** 0.5 / plain if len(turns) > 1 else None
    task = rule(options.resolution)
    rule_seconds = statistics.median(common.seconds_of(task) for _ in range(200))
    overhead, share = medians["safeguard"] / plain - 1, rule_seconds / plain
    result = {
        "parameters": counts,
        **flat(options),
        **found,
        "median_seconds": medians,
        "overhead_of_medians": overhead,
        "overhead_standard_error": error,
        "rule_seconds": rule_seconds,
        "rule_share_of_step": share,
    }
    print(f"median step: {plain:.2f} s plain, {medians['safeguard']:.2f} s safeguard")
    noise = "" if error is None else f", give or take {100 * error:.1f} %"
    print(f"overhead of the medians: {100 * overhead:+.2f} %{noise}")
    print(f"the rule alone: {1e3 * rule_seconds:.3f} ms, {100 * share:.4f} % of it")
    print(f"peak memory: {peak:.1f} GiB")
    common.write_result(options.out, "full_size_step.py", result)
    return 0


if __name__ == "__main__":
    run_main(main, "full_size_step")

"""A training run whose steps are taken one at a time, and its worker process.

    python -m scripts.bench.training STYLE train.py's flags...

takes one optimizer step whenever a line arrives on standard input (see `common.Worker`) and answers
with its metrics. It ends when its standard input does, and saves nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from scripts.bench.common import answer
from sdpo.common.errors import run_main
from sdpo.config import TrainConfig, parse_train
from sdpo.training.places import check_places

if TYPE_CHECKING:
    from sdpo.training.run import Run
    from sdpo.training.step import Step

TakeStep = Callable[["Step"], None]


def open_run(config: TrainConfig) -> Run:
    """Build a run as train.py does, ready for its first step.

    Raises:
        UserError: something that the settings name is not to be had or does not fit.
    """
    from sdpo.data.source import open_pairs
    from sdpo.models import open_base
    from sdpo.training.build import build_loader, build_models
    from sdpo.training.run import Run
    from sdpo.training.update import Update

    config = check_places(config)
    run, base = Run(config), open_base(config)
    with run.accelerator.local_main_process_first():
        pairs = open_pairs(config.data, config.run.seed)
    loader = build_loader(config, base, pairs, run)
    models = build_models(config, base, loader, run)
    run.begin(models, loader, Update(config, models, loader.max_train_steps, run))
    return run


def own_step(run: Run) -> TakeStep:
    """Make the step of train.py."""
    from train import pair_loss

    def take(step: Step) -> None:
        for micro in step.micro_batches():
            with run.update.accumulating(micro.last):
                output = pair_loss(run.config, run, micro)
                run.update.backward(output.loss)
            step.record(output, micro)
        run.update.apply(step)

    return take


def public_step(run: Run) -> TakeStep:
    """Make a step in the manner of the first public code."""
    from scripts.bench.public_style import PublicStep

    return PublicStep(run)


def bare_step(run: Run) -> TakeStep:
    """Make a step of a bare loop."""
    from scripts.bench.bare import BareStep

    return BareStep(run)


def example_step(run: Run) -> TakeStep:
    """Make a step in the manner of diffusers' LoRA example."""
    from scripts.bench.example_style import ExampleStep

    return ExampleStep(run)


STYLES = {"own": own_step, "public": public_step, "bare": bare_step, "example": example_step}


def main() -> int:
    """Train until nobody asks for more."""
    style, *argv = sys.argv[1:]
    run = open_run(parse_train(argv))
    take = STYLES[style](run)
    steps = run.steps()
    answer({"resolution": run.config.data.resolution})
    for _ in sys.stdin:
        step = next(steps)
        take(step)
        run.after(step)
        answer({k: v for k, v in step.entry.items() if isinstance(v, int | float)})
    return 0


if __name__ == "__main__":
    run_main(main, "train.py")

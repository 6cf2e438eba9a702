"""Align a text-to-image model with preference pairs: `accelerate launch train.py ...`, or on one
device `python train.py ...`. This file is the algorithm; its parts are in `sdpo/`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sdpo.common.errors import run_main
from sdpo.config import TrainConfig, parse_train
from sdpo.evaluation.score.relabel import check_choice_model
from sdpo.training.places import check_places

if TYPE_CHECKING:
    from sdpo.losses.preference import LossOutput
    from sdpo.training.run import Run
    from sdpo.training.step import MicroBatch


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config = parse_train(sys.argv[1:])
    check_choice_model(config.data)
    config = check_places(config)
    if config.run.check_only:
        return 0

    # After the checks: these imports take seconds.
    from sdpo.data.source import open_pairs
    from sdpo.evaluation.score.relabel import relabel
    from sdpo.models import open_base
    from sdpo.training.build import build_loader, build_models
    from sdpo.training.run import Run
    from sdpo.training.update import Update

    run = Run(config)
    base = open_base(config)
    with run.accelerator.local_main_process_first():
        pairs = open_pairs(config.data, config.run.seed)
    if config.data.choice_model:
        pairs = relabel(pairs, config.data, run.accelerator)
    loader = build_loader(config, base, pairs, run)
    models = build_models(config, base, loader, run)  # the UNet and its frozen reference
    update = Update(config, models, loader.max_train_steps, run)
    run.begin(models, loader, update)

    with run:  # what an error ends is saved
        for step in run.steps():
            for micro in step.micro_batches():  # x_t = a_t x_0 + s_t eps, t, eps shared by a pair
                with update.accumulating(micro.last):
                    output = pair_loss(config, run, micro)
                    update.backward(output.loss)
                step.record(output, micro)
            update.apply(step)  # average over processes, clip, step, unless it is not finite
            run.after(step)  # log, checkpoint, sample grid
        return run.finish()


def pair_loss(config: TrainConfig, run: Run, micro: MicroBatch) -> LossOutput:
    """Take the preference loss of B pairs, winners and losers in one batch of 2B.

    With the safeguard, the loser's part of the gradient is scaled so that a step does not raise the
    winner's error to first order (arXiv 2511.03317).
    """
    from sdpo.losses.preference import preference_loss
    from sdpo.models.forward import predict
    from sdpo.models.lora import seed_dropout
    from sdpo.training.reference_cache.ask import ask_reference

    method, guard, family = config.method, config.safeguard, run.models.base.family

    reference, errors = ask_reference(run, micro)  # its output, or its errors where they are kept
    if config.model.lora_dropout:
        seed_dropout(micro.keys)
    with run.accelerator.autocast():
        prediction = predict(family, run.models.unet, micro.inputs, micro.drawn)
    return preference_loss(
        method.train_method,
        prediction,
        reference,
        micro.inputs.target,
        beta=method.beta_dpo,
        mu=guard.output_mu,
        scope=guard.scope,
        fixed_scale=micro.scale,
        ref_errors=errors,
        loser_weights=micro.loser_weights,
        **method.options(family.name),
    )


if __name__ == "__main__":
    run_main(main, "train.py")

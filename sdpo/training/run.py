"""The training loop: accumulate, step, log, checkpoint, stop cleanly."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sdpo.common.errors import UserError
from sdpo.common.randomness import Key
from sdpo.common.signals import StopRequest
from sdpo.data.loader import PairLoader
from sdpo.data.order import Place
from sdpo.data.pairs import PairBatch
from sdpo.losses.preference import LossOutput, get_method, preference_loss
from sdpo.models.forward import (
    NoisedPairs,
    noise_pairs,
    predict,
    predict_reference,
    predict_winners_only,
)
from sdpo.models.lora import seed_dropout
from sdpo.training.accumulation import Accumulation
from sdpo.training.checkpoint import Progress
from sdpo.training.checkpoint_paths import latest_checkpoint
from sdpo.training.distributions import Distributions
from sdpo.training.metrics import StepMetrics
from sdpo.training.parameter_safeguard import BranchGradients
from sdpo.training.runlog import RunLog, peak_memory_gib
from sdpo.training.saving import save_run
from sdpo.training.sharding import gathered, whole
from sdpo.training.state import Models
from sdpo.training.tracking import track

log = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """One micro-batch of B pairs, ready for the UNet."""

    inputs: NoisedPairs
    keys: list[Key]
    place_after: Place


class Trainer:
    """One run. `train()` returns the exit code: 0 when all steps are done."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        models: Models,
        loader: PairLoader,
        accumulation: Accumulation,
        optimizer: Any,
        scheduler: Any,
        start: Progress,
        max_train_steps: int,
    ) -> None:
        self.args, self.accelerator, self.models = args, accelerator, models
        self.loader, self.accumulation = loader, accumulation
        self.optimizer, self.scheduler = optimizer, scheduler
        self.progress, self.max_train_steps = start, max_train_steps
        self.output_dir = Path(args.output_dir)
        self.nonfinite_in_a_row = self.nonfinite_steps = 0
        self.stop = StopRequest()
        self.stop_agreed = False
        self.device = accelerator.device
        self.winners_only = not getattr(get_method(args.train_method), "USES_LOSERS", True)
        self.timesteps = models.encoder.schedule.config.num_train_timesteps
        self.gradients: BranchGradients | None = None
        if args.winner_preserving_space == "parameter":
            self.gradients = BranchGradients(
                accelerator, models.unet, args.winner_preserving_mu, args.lora_dropout > 0
            )
        # Else a scale is taken within each micro-batch.
        per_pair = args.winner_preserving_scope == "pair"
        self.one_scale_a_step = self.gradients is not None and not per_pair

    def train(self) -> int:
        """Train up to `max_train_steps`.

        Raises:
            UserError: too many bad images or non-finite steps in a row.
        """
        main = self.accelerator.is_main_process
        run_log = RunLog(self.output_dir, self.progress.step) if main else None
        bar = tqdm(
            total=self.max_train_steps,
            initial=self.progress.step,
            desc=self.args.train_method,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        batches = iter(self.loader)
        self.models.unet.train()
        if self.progress.step == 0:
            self._draw_samples()
        try:
            with logging_redirect_tqdm():
                self._loop(batches, run_log, bar)
        finally:
            bar.close()
            if run_log:
                run_log.close()
        if self.progress.step >= self.max_train_steps:
            self.save()
            return 0
        self._save_unless_nonfinite()
        log.warning("stopped by a signal after step %d", self.progress.step)
        return self.stop.exit_code

    def _loop(self, batches: Iterator[PairBatch], run_log: RunLog | None, bar: tqdm) -> None:
        while self.progress.step < self.max_train_steps:
            entry = self.step(batches)
            if entry is None:
                break
            if run_log:
                run_log.write(entry)
                track(self.accelerator, entry, self.timesteps)
            bar.update()
            bar.set_postfix(
                loss=f"{entry['loss']:.4f}",
                drift=f"{entry['winner_drift']:+.1e}",
                acc=f"{entry['implicit_acc']:.2f}",
            )
            if self.stop_agreed:
                break
            if self.progress.step % self.args.checkpointing_steps == 0:
                self._save_unless_nonfinite()
            if self.progress.step % self.args.validation_steps == 0:
                self._draw_samples()

    def step(self, batches: Iterator[PairBatch]) -> dict[str, Any] | None:
        """One optimizer step; None where a signal came before it was complete."""
        began = time.perf_counter()
        metrics, spread = StepMetrics(), Distributions(self.timesteps)
        bad_before = len(self.loader.counter.rows)
        place = self.progress.place
        micro_batches, scale = self._prepare(batches)
        for micro in range(self.args.gradient_accumulation_steps):
            # Several processes agree on stopping at the step's end: one that left now would leave
            # the others waiting for its gradients.
            if self._stopped_alone():
                self.optimizer.zero_grad(set_to_none=True)
                self.stop_agreed = True
                return None
            batch = next(micro_batches)
            last = micro == self.args.gradient_accumulation_steps - 1
            with self.accumulation.micro_batch(last):
                output = self._losses(batch, scale)
                self.accumulation.backward(output.loss / self.args.gradient_accumulation_steps)
            metrics.add(output.metrics)
            once = micro == 0 and self.accelerator.is_main_process
            timesteps = batch.inputs.timesteps[: len(batch.keys)]
            spread.add(output, timesteps, count_scales=once or not self.one_scale_a_step)
            place = batch.place_after
        grad_norm = self.accumulation.clip()
        means, sums, spread_sums = metrics.reduce(
            self.accelerator,
            {
                "stop": float(bool(self.stop)),
                "bad_rows": float(len(self.loader.counter.rows) - bad_before),
            },
            spread.sums(),
        )
        self.stop_agreed = sums["stop"] > 0
        self._apply(means["loss"], float(grad_norm))
        step = self.progress.step + 1
        lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.progress = Progress(step, Place(*place))
        pairs = self.loader.stride * self.args.gradient_accumulation_steps
        seconds = time.perf_counter() - began
        return {
            "step": step,
            "epoch": place.epoch,
            **means,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "seconds": seconds,
            "pairs_per_s": pairs / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
            "nonfinite_steps": self.nonfinite_steps,
            "bad_rows": int(sums["bad_rows"]),
            **spread.read(spread_sums),
        }

    def _stopped_alone(self) -> bool:
        return bool(self.stop) and self.accelerator.num_processes == 1

    def _prepare(
        self, batches: Iterator[PairBatch]
    ) -> tuple[Iterator[MicroBatch], Tensor | float | None]:
        """The step's micro-batches, and the loser's scale where one holds for the whole step.

        They are noised as they are asked for; where that scale comes from the gradients of all of
        them, all are noised and gone through here, and kept as latents.
        """
        coming = map(self._noised, batches)
        if not self.one_scale_a_step:
            return coming, self.args.loser_scale_fixed
        kept: list[MicroBatch] = []
        for _ in range(self.args.gradient_accumulation_steps):
            if self._stopped_alone():
                return iter(kept), None
            kept.append(next(coming))
            self.gradients.add(kept[-1].inputs, kept[-1].keys)
        return iter(kept), self.gradients.step_scale()

    def _noised(self, batch: PairBatch) -> MicroBatch:
        # Outside autocast: the frozen parts have a dtype of their own, float32 for a VAE that
        # overflows in float16.
        args = self.args
        inputs = noise_pairs(self.models.encoder, batch, args.noise_offset, args.input_perturbation)
        return MicroBatch(inputs, batch.keys, self.loader.place_after(batch))

    def _losses(self, batch: MicroBatch, scale: Tensor | float | None) -> LossOutput:
        """`scale`: the loser's, where one holds for the whole step."""
        args, models, inputs = self.args, self.models, batch.inputs
        if scale is None and self.gradients:
            scale = self.gradients.pair_scales(inputs, batch.keys)
        at_output = args.use_winner_preserving and not self.gradients
        reference = predict_reference(models.reference, inputs, self.accelerator.autocast())
        if args.lora_dropout:
            seed_dropout(batch.keys)
        with self.accelerator.autocast():
            forward = predict_winners_only if self.winners_only else predict
            prediction = forward(models.unet, inputs)
        return preference_loss(
            args.train_method,
            prediction,
            reference,
            inputs.target,
            beta=args.beta_dpo,
            mu=args.winner_preserving_mu if at_output else None,
            scope=args.winner_preserving_scope,
            fixed_scale=scale,
            alpha=args.dmpo_alpha,
            form=args.dspo_form or models.family.name,
        )

    def _apply(self, loss: float, grad_norm: float) -> None:
        """Step the optimizer, or skip and count a step that is not finite."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        scaler = self.accelerator.scaler
        # In fp16 the gradient scaler itself skips an overflow and lowers its scale; while the scale
        # is still above 1 that is how it finds its value, not a fault.
        searching = scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1.0
        if finite or scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.models.ema and finite and not self.optimizer.step_was_skipped:
            self.models.ema.update()
        if finite:
            self.nonfinite_in_a_row = 0
            return
        if searching:
            return
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        log.warning(
            "step %d skipped: loss %s, gradient norm %s", self.progress.step + 1, loss, grad_norm
        )
        if self.nonfinite_in_a_row > self.args.max_nonfinite_steps:
            kept = latest_checkpoint(self.output_dir)
            raise UserError(
                f"loss or gradient was not finite in {self.nonfinite_in_a_row} steps in a row "
                f"(--max_nonfinite_steps {self.args.max_nonfinite_steps}): lower --learning_rate "
                "or --beta_dpo, or use --mixed_precision bf16 or no; the last good checkpoint is "
                f"{kept or 'none yet'}"
            )

    def _save_unless_nonfinite(self) -> None:
        # Amid non-finite steps the weights may already be bad: the last good checkpoint stays last.
        if self.nonfinite_in_a_row == 0 and self.progress.step > 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint. Called by every process; the main one writes, the others wait."""
        main = self.accelerator.is_main_process
        optimizer = whole(self.optimizer.state_dict(), keep=main)
        models = gathered(self.models, self.accelerator)
        if models is not None:
            training = {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
            if self.accelerator.scaler is not None:
                training["scaler"] = self.accelerator.scaler.state_dict()
            save_run(self.args, self.progress, models, training)
        self.accelerator.wait_for_everyone()

    def _draw_samples(self) -> None:
        if not self.args.validation_prompts:
            return
        models = gathered(self.models, self.accelerator)
        if models is not None:
            from sdpo.training.samples import draw_grid

            unet = models.unet.to(self.device).eval()
            with self.accelerator.autocast():
                draw_grid(self.args, models, unet, self.accelerator, self.progress.step)
            unet.train()
        self.accelerator.wait_for_everyone()

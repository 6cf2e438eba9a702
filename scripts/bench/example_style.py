"""A training step in the manner of diffusers' LoRA example of Diffusion-DPO, as a baseline.

Written anew on this project's models, data and accelerator, after how such examples are built:
images and captions are encoded in each micro-step; both halves of a pair go through the UNet with
adapters, then with them switched off under no_grad; the loss is plain Diffusion-DPO, without the
safeguard; after each micro-step the mean loss is gathered and read, and loss and implicit accuracy
once more for the progress bar.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from scripts.bench.public_style import close, noised
from sdpo.models.forward import predict

if TYPE_CHECKING:
    from sdpo.training.run import Run
    from sdpo.training.step import Step


class ExampleStep:
    """Takes the steps of a run with adapters and without a cache."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.family = run.models.base.family
        self.frozen = run.models.encoder.frozen

    def __call__(self, step: Step) -> None:
        """Take one step; its entry has loss, seconds and peak memory in GiB."""
        began = time.perf_counter()
        run, optim, accelerator = self.run, self.config.optim, self.run.accelerator
        accumulation, loss_sum = optim.gradient_accumulation_steps, 0.0
        for micro in range(accumulation):
            batch = next(step.batches)
            inputs = noised(
                self.family, self.frozen, batch, self.config.data.resolution, run.device
            )
            with accelerator.autocast():
                prediction = predict(self.family, run.models.unet, inputs)
            error = F.mse_loss(prediction.float(), inputs.target.float(), reduction="none")
            error_w, error_l = error.mean(dim=[1, 2, 3]).chunk(2)
            with torch.no_grad(), accelerator.autocast():
                reference = predict(self.family, run.models.reference, inputs)
                ref_error = F.mse_loss(reference, inputs.target, reduction="none")
                ref_w, ref_l = ref_error.mean(dim=[1, 2, 3]).chunk(2)
            inside = -0.5 * self.config.method.beta_dpo * ((error_w - error_l) - (ref_w - ref_l))
            loss = -F.logsigmoid(inside).mean()
            gathered = accelerator.gather(loss.detach().repeat(optim.train_batch_size))
            loss_sum += gathered.mean().item() / accumulation
            accelerator.backward(loss / accumulation)
            if micro == accumulation - 1:
                accelerator.clip_grad_norm_(run.models.trainable, optim.max_grad_norm)
                run.update.optimizer.step()
                run.update.scheduler.step()
                run.update.optimizer.zero_grad()
            loss.item()
            accuracy = (inside > 0).float().mean().item()
        close(step, run, batch, began, loss=loss_sum, implicit_acc=accuracy)

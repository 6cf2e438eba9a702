"""A bare training loop of the same mathematics, as a baseline: what the rest of train.py costs.

The trained model, its frozen reference, VAE and text encoders are the run's own. Beside them there
is a random draw, Diffusion-DPO with the safeguard written out, the gradient clipped and torch's
fused AdamW: no accelerate, no keyed randomness, no metrics but the loss, no averages, no checks.
The loss is read once a step, which is where a step's time is taken.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench.public_style import close, noised
from sdpo.common.errors import UserError
from sdpo.common.precision import DTYPES
from sdpo.models.forward import predict

if TYPE_CHECKING:
    from sdpo.training.run import Run
    from sdpo.training.step import Step


class BareStep:
    """Takes the steps of a run without a cache; in float32 or bf16, on one device.

    Raises:
        UserError: the run is in fp16, which wants a gradient scaler.
    """

    def __init__(self, run: Run) -> None:
        if run.config.optim.mixed_precision == "fp16":
            raise UserError("the bare step has no gradient scaler: --mixed_precision no or bf16")
        self.run, self.config = run, run.config
        self.family = run.models.base.family
        self.frozen = run.models.encoder.frozen
        self.unet = run.accelerator.unwrap_model(run.models.unet)
        self.parameters = run.models.trainable
        self.optimizer = torch.optim.AdamW(
            self.parameters, run.update.learning_rate, weight_decay=1e-2, fused=True
        )

    def __call__(self, step: Step) -> None:
        """Take one step; its entry has loss, seconds and peak memory in GiB."""
        began = time.perf_counter()
        optim, device, loss_sum = self.config.optim, self.run.device, 0.0
        for _ in range(optim.gradient_accumulation_steps):
            batch = next(step.batches)
            inputs = noised(self.family, self.frozen, batch, self.config.data.resolution, device)
            with self._autocast():
                prediction = predict(self.family, self.unet, inputs)
            with torch.no_grad(), self._autocast():
                reference = predict(self.family, self.run.models.reference, inputs)
            loss = self._loss(prediction.float(), reference.float(), inputs.target)
            (loss / optim.gradient_accumulation_steps).backward()
            loss_sum = loss_sum + loss.detach() / optim.gradient_accumulation_steps
        torch.nn.utils.clip_grad_norm_(self.parameters, optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        close(step, self.run, batch, began, loss=float(loss_sum))

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.config.optim.mixed_precision
        if precision == "no":
            return nullcontext()
        return torch.autocast(self.run.device.type, DTYPES[precision])

    def _loss(self, prediction: Tensor, reference: Tensor, target: Tensor) -> Tensor:
        residual_w, residual_l = (prediction - target).chunk(2)
        error_w, error_l = _mean(residual_w.square()), _mean(residual_l.square())
        ref_w, ref_l = _mean((reference - target).square()).chunk(2)
        guard = self.config.safeguard
        if guard.use_winner_preserving:
            inner = _mean(residual_w.detach() * residual_l.detach())
            norm = error_w.detach()
            if guard.scope == "batch":
                inner, norm = inner.mean(), norm.mean()
            limit = (1 - guard.winner_preserving_mu) * norm / inner
            scale = torch.where(inner > 0, limit.clamp(max=1), 1)
            error_l = error_l.detach() + scale * (error_l - error_l.detach())
        margin = (error_w - error_l) - (ref_w - ref_l)
        return -F.logsigmoid(-0.5 * self.config.method.beta_dpo * margin).mean()


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)

"""A training step in the manner of the first public code of this method, as a baseline.

Written from a reading of AIDC-AI/Diffusion-SDPO's train.py, on this project's models, data and
accelerator, so that the two differ in the step alone. What that code does and this repeats:

- images and captions are encoded in each micro-step, whatever the run's flags;
- the reference is a second UNet, all of it in the run's precision;
- the safeguard's scale comes from two calls of autograd on the mean squared errors;
- after each micro-step seven averages are gathered and read on the host one by one, and the loss
  once more for the progress bar: eight waits for the device.

Not repeated: xformers (PyTorch's own attention has taken its place), which that code requires, and
the random numbers' order. Diffusion-DPO with the safeguard in batch scope.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo.models.base import repeat
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import NoisedPairs, predict
from sdpo.training.runlog import peak_memory_gib
from sdpo.training.state import Progress

if TYPE_CHECKING:
    from sdpo.data.pairs import PairBatch
    from sdpo.models.base import Family, Frozen
    from sdpo.training.run import Run
    from sdpo.training.step import Step


class PublicStep:
    """Takes the steps of a run that has its models, and so no cache and no adapters."""

    def __init__(self, run: Run) -> None:
        self.config, self.run = run.config, run
        self.family = run.models.base.family
        assert isinstance(run.models.encoder, ModelEncoder)
        self.frozen = run.models.encoder.frozen
        assert isinstance(run.models.reference, torch.nn.Module)
        self.reference = run.models.reference.to(self.frozen.vae.dtype)

    def __call__(self, step: Step) -> None:
        """Take one step; its entry has loss, seconds and peak memory in GiB."""
        began = time.perf_counter()
        run, optim, accelerator = self.run, self.config.optim, self.run.accelerator
        accumulation = optim.gradient_accumulation_steps
        loss_sum = 0.0
        for micro in range(accumulation):
            batch = next(step.batches)
            inputs = noised(
                self.family, self.frozen, batch, self.config.data.resolution, run.device
            )
            with accelerator.autocast():
                prediction = predict(self.family, run.models.unet, inputs)
            loss, averages = self._loss(prediction, inputs)
            read = [self._gathered(value) for value in averages]
            loss_sum += read[0] / accumulation
            accelerator.backward(loss / accumulation)
            if micro == accumulation - 1:
                if not optim.use_adafactor:
                    accelerator.clip_grad_norm_(run.models.unet.parameters(), optim.max_grad_norm)
                run.update.optimizer.step()
                run.update.scheduler.step()
                run.update.optimizer.zero_grad()
            loss.detach().item()
        close(step, run, batch, began, loss=loss_sum, winner_drift=read[4], implicit_acc=read[3])

    def _gathered(self, value: Tensor) -> float:
        repeated = value.detach().repeat(self.config.optim.train_batch_size)
        return self.run.accelerator.gather(repeated).mean().item()

    def _loss(self, prediction: Tensor, inputs: NoisedPairs) -> tuple[Tensor, list[Tensor]]:
        """Take the loss, and the seven scalars that are averaged over processes."""
        target, beta = inputs.target, self.config.method.beta_dpo
        error_w, error_l = _errors(prediction, target)
        scale = autograd_scale(prediction, target, self.config.safeguard.winner_preserving_mu)
        scaled = error_l.detach() + scale * (error_l - error_l.detach())
        with torch.no_grad():
            ref_w, ref_l = _errors(predict(self.family, self.reference, inputs), target)
        u = -0.5 * beta * ((error_w - scaled) - (ref_w - ref_l))
        loss = -F.logsigmoid(u).mean()
        return loss, [
            loss,
            0.5 * (error_w.mean() + error_l.mean()),
            0.5 * (ref_w.mean() + ref_l.mean()),
            (u > 0).float().mean(),
            (error_w - ref_w).mean(),
            (error_l - ref_l).mean(),
            scale,
        ]


@torch.no_grad()
def noised(
    family: Family, frozen: Frozen, batch: PairBatch, resolution: int, device: torch.device
) -> NoisedPairs:
    """Encode a batch and noise it by torch's own generator: DDPM's process with the noise as the
    target, or a rectified flow with times sigmoid(z), z standard normal, and velocities."""
    vae = frozen.vae
    pixels = batch.pixels.to(device, vae.dtype)
    latents = family.normalise(vae.encode(pixels).latent_dist.sample(), vae.config)
    conditions = repeat(family.encode_captions(frozen, batch.captions, resolution), 2)
    noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
    pairs = len(latents) // 2
    if family.facts.flow:
        times = torch.sigmoid(torch.randn(pairs, device=device)).repeat(2)
        sigma = times.reshape(-1, 1, 1, 1).to(latents.dtype)
        noisy = (1 - sigma) * latents + sigma * noise
        return NoisedPairs(noisy, times, noise - latents, conditions)
    count = frozen.scheduler.config.num_train_timesteps
    times = torch.randint(count, (pairs,), device=device).repeat(2)
    return NoisedPairs(frozen.scheduler.add_noise(latents, noise, times), times, noise, conditions)


def close(step: Step, run: Run, batch: PairBatch, began: float, **measured: float) -> None:
    """Close a baseline's step: where the run stands, and its entry, with what the progress bar
    shows."""
    step.progress = Progress(step.number, run.loader.place_after(batch))
    step.entry = {
        "step": step.number,
        "winner_drift": math.nan,
        "implicit_acc": math.nan,
        **measured,
        "seconds": time.perf_counter() - began,
        "peak_memory_gib": peak_memory_gib(run.device),
    }


def _errors(prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Mean squared errors of winners and losers, (B,) each."""
    return (prediction - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)


def autograd_scale(prediction: Tensor, target: Tensor, mu: float) -> Tensor:
    """Find the batch's scale, (), by differentiating both halves' errors.

    Gradients of means of squares are 2 (prediction - target) / count: up to that factor, which
    cancels, they are the residuals that `sdpo.loser_scale` takes.
    """
    halves = [half.detach().requires_grad_() for half in prediction.chunk(2)]
    gradients = []
    for half, goal in zip(halves, target.detach().chunk(2), strict=True):
        with torch.enable_grad():
            error = (half - goal).pow(2).mean()
        gradients.append(torch.autograd.grad(error, half)[0].flatten().float())
    winner, loser = gradients
    inner = winner @ loser
    limit = (1 - mu) * (winner @ winner) / inner.clamp_min(1e-30)
    return torch.where(inner > 0, limit, torch.ones_like(limit)).clamp(0, 1)

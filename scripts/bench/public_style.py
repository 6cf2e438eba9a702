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

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo.data.order import Place
from sdpo.models.forward import NoisedPairs, predict
from sdpo.training.runlog import peak_memory_gib


def public_step(trainer: Any, batches: Any) -> dict[str, Any]:
    """One optimizer step of a `Trainer`; returns its loss, seconds and peak memory in GiB."""
    began = time.perf_counter()
    accumulation = trainer.args.gradient_accumulation_steps
    loss_sum = 0.0
    for micro in range(accumulation):
        batch = next(batches)
        inputs = _noised(trainer, batch)
        with trainer.accelerator.autocast():
            prediction = predict(trainer.models.unet, inputs)
        loss, averages = _loss(trainer, prediction, inputs)
        read = [_gathered(trainer, value) for value in averages]
        loss_sum += read[0] / accumulation
        trainer.accelerator.backward(loss / accumulation)
        if micro == accumulation - 1:
            if not trainer.args.use_adafactor:
                trainer.accelerator.clip_grad_norm_(
                    trainer.models.unet.parameters(), trainer.args.max_grad_norm
                )
            trainer.optimizer.step()
            trainer.scheduler.step()
            trainer.optimizer.zero_grad()
        loss.detach().item()
    place = trainer.loader.place_after(batch)
    trainer.progress = type(trainer.progress)(trainer.progress.step + 1, Place(*place))
    return {
        "step": trainer.progress.step,
        "loss": loss_sum,
        "winner_drift": read[4],
        "implicit_acc": read[3],
        "seconds": time.perf_counter() - began,
        "peak_memory_gib": peak_memory_gib(trainer.device),
    }


def _gathered(trainer: Any, value: Tensor) -> float:
    repeated = value.detach().repeat(trainer.args.train_batch_size)
    return trainer.accelerator.gather(repeated).mean().item()


def _noised(trainer: Any, batch: Any) -> NoisedPairs:
    encoder = trainer.models.encoder
    family, frozen, device = encoder.family, encoder.frozen, trainer.device
    dtype = frozen.vae.dtype
    with torch.no_grad():
        posterior = frozen.vae.encode(batch.pixels.to(device, dtype)).latent_dist
        latents = posterior.sample() * frozen.vae.config.scaling_factor
        conditioning = family.encode_captions(frozen, batch.captions, encoder.resolution).repeat(2)
    noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
    steps = frozen.scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents) // 2,), device=device).repeat(2)
    noisy = frozen.scheduler.add_noise(latents, noise, timesteps)
    return NoisedPairs(noisy, timesteps, noise, conditioning)


def _reference(trainer: Any) -> Any:
    """The run's reference, on the first call cast as a whole."""
    reference = trainer.models.reference
    if not getattr(reference, "cast_whole", False):
        reference.to(trainer.models.encoder.frozen.vae.dtype).cast_whole = True
    return reference


def _loss(trainer: Any, prediction: Tensor, inputs: NoisedPairs) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the seven scalars that are averaged over processes."""
    args, target = trainer.args, inputs.target
    errors = (prediction - target).pow(2).mean(dim=[1, 2, 3])
    error_w, error_l = errors.chunk(2)
    scale = autograd_scale(prediction, target, args.winner_preserving_mu)
    scaled = error_l.detach() + scale * (error_l - error_l.detach())
    with torch.no_grad():
        ref_prediction = predict(_reference(trainer), inputs)
        ref_errors = (ref_prediction - target).pow(2).mean(dim=[1, 2, 3])
        ref_w, ref_l = ref_errors.chunk(2)
    u = -0.5 * args.beta_dpo * ((error_w - scaled) - (ref_w - ref_l))
    loss = -F.logsigmoid(u).mean()
    return loss, [
        loss,
        0.5 * (error_w.mean() + error_l.mean()),
        ref_errors.mean(),
        (u > 0).float().mean(),
        (error_w - ref_w).mean(),
        (error_l - ref_l).mean(),
        scale,
    ]


def autograd_scale(prediction: Tensor, target: Tensor, mu: float) -> Tensor:
    """The batch's scale by differentiating both halves' errors, ().

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

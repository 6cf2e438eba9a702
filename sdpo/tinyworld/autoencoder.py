"""Training of the tiny autoencoder that both tiny base models share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sdpo.tinyworld import oracle, world

# diffusers' AutoencoderKL, whose methods its type does not name.
Vae = Any

# Mean of the KL term over latents; only there to keep the latents from drifting far out.
KL_WEIGHT = 1e-6
INITIAL_LOG_VARIANCE = -6.0
LEARNING_RATE = 4e-3


def to_model_range(images: np.ndarray) -> torch.Tensor:
    """Turn uint8 (B, 64, 64, 3) into float32 (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@contextmanager
def cosine_optimizer(
    parameters: list[torch.nn.Parameter], learning_rate: float, steps: int, desc: str
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yield ``step(loss)``: backward, clip to norm 1, AdamW with warm-up then cosine decay."""
    warmup = min(100, max(1, steps // 10))
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, i / steps))),
    )
    bar = tqdm(total=steps, desc=desc, unit="step")
    smooth: float | None = None

    def step(loss: torch.Tensor) -> None:
        nonlocal smooth
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)

    try:
        yield step
    finally:
        bar.close()


def _random_crops(images: np.ndarray, side: int, generator: torch.Generator) -> np.ndarray:
    """Crop (B, 64, 64, 3) to (B, side, side, 3) around the middle, where the objects are."""
    spare = images.shape[1] - side
    corners = torch.randint(spare // 8, spare - spare // 8, (len(images), 2), generator=generator)
    pairs = zip(images, corners.tolist(), strict=True)
    return np.stack([image[y : y + side, x : x + side] for image, (y, x) in pairs])


def train_vae(
    vae: Vae,
    images: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Fit the autoencoder in place: L1 + L2 reconstruction and a tiny KL term.

    The first two thirds of the steps see crops of half the side, of which a step costs a quarter
    and objects fill more; the rest see whole images, so that the norms meet their real statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Start all but noise-free: at the default unit variance colours take long to come through.
        log_variance = slice(vae.config.latent_channels, None)
        vae.quant_conv.weight[log_variance] = 0.0
        vae.quant_conv.bias[log_variance] = INITIAL_LOG_VARIANCE
    vae.train().to(memory_format=torch.channels_last)
    with cosine_optimizer(list(vae.parameters()), learning_rate, steps, "autoencoder") as step:
        for i in range(steps):
            on_crops = i < 2 * steps // 3
            count = batch_size * (2 if on_crops else 1)
            index = torch.randint(len(images), (count,), generator=generator)
            batch = images[index.numpy()]
            if on_crops:
                batch = _random_crops(batch, images.shape[1] // 2, generator)
            pixels = to_model_range(batch)
            posterior = vae.encode(pixels).latent_dist
            error = vae.decode(posterior.sample(generator)).sample - pixels
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
            step(error.abs().mean() + error.square().mean() + KL_WEIGHT * kl)
    vae.eval()


def encode_latents(vae: Vae, images: np.ndarray, batch: int = 256) -> torch.Tensor:
    """Encode images to posterior means, not yet scaled: float32 (N, 4, 16, 16)."""
    parts = []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), batch), desc="encode", unit="batch"):
            pixels = to_model_range(images[start : start + batch])
            parts.append(vae.encode(pixels).latent_dist.mean.contiguous())
    return torch.cat(parts)


def standardise_latents(vae: Vae, latents: torch.Tensor) -> None:
    """Give all latent channels mean 0 and one common std, whose inverse is ``scaling_factor``.

    The change is folded into the 1 x 1 convolutions on both sides of the latents, so the
    autoencoder still computes the same images; sampling starts from unit Gaussian noise, which the
    latents thereby resemble. ``latents`` are unscaled posterior means of shape (N, 4, 16, 16).
    """
    mean = latents.mean(dim=(0, 2, 3))
    std = latents.std(dim=(0, 2, 3))
    common = std.square().mean().sqrt()
    gain = common / std
    channels = len(mean)
    with torch.no_grad():
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:channels] *= gain[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean) * gain
        before.bias[channels:] += 2 * gain.log()  # log variances
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1.0 / float(common), 6))


def vae_quality(vae: Vae, n: int, seed: int) -> dict[str, float]:
    """Score clean images after a round trip by the oracle: what a perfect denoiser could reach."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(n)]
    pixels = to_model_range(np.stack([world.render_array(scene) for scene in scenes]))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1.0, 1.0)
    images = ((decoded + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    scores = oracle.mean_score(list(images), [world.caption(scene) for scene in scenes])
    return {"follows": round(scores.follows, 4), "clean": round(scores.clean, 4)}

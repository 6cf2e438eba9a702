from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sdpo.tinyworld import architecture, autoencoder, pretrain


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return pretrain.make_dataset(64, 0)[0]


def trained(images: np.ndarray, steps: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = architecture.build_vae("micro")
    autoencoder.train_vae(vae, images, steps=steps, batch_size=8, learning_rate=1e-2, seed=0)
    return vae


def test_training_reduces_the_error_and_is_deterministic(images: np.ndarray) -> None:
    pixels = autoencoder.to_model_range(images)

    def error(vae: torch.nn.Module) -> float:
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        return float((decoded - pixels).abs().mean())

    first = error(trained(images, 60))
    assert first < 0.7 * error(trained(images, 1))
    assert first == pytest.approx(error(trained(images, 60)), rel=1e-3)


def test_standardising_keeps_the_images_and_unit_latents(images: np.ndarray) -> None:
    vae = trained(images, 5)
    with torch.no_grad():
        # Make the work worth doing: far from mean 0, unequal spread, visible variances.
        vae.quant_conv.weight[:4] *= torch.tensor([1.0, 3.0, 0.5, 2.0])[:, None, None, None]
        vae.quant_conv.bias[:4] += torch.tensor([1.0, -2.0, 0.0, 0.5])
    before = copy.deepcopy(vae)
    latents = autoencoder.encode_latents(vae, images)
    autoencoder.standardise_latents(vae, latents)
    pixels = autoencoder.to_model_range(images[:8])
    with torch.no_grad():
        old, new = before.encode(pixels).latent_dist, vae.encode(pixels).latent_dist
        assert torch.allclose(
            before.decode(old.mean).sample, vae.decode(new.mean).sample, atol=1e-4
        )
        # The posterior's noise is rescaled with its mean.
        ratio = latents.std((0, 2, 3)) / latents.std((0, 2, 3)).square().mean().sqrt()
        assert torch.allclose(old.std, new.std * ratio[:, None, None], rtol=1e-3)
    scaled = autoencoder.encode_latents(vae, images) * vae.config.scaling_factor
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-3)


def test_model_range_and_layout() -> None:
    images = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    images[0, 5, 9] = (255, 0, 255)
    pixels = autoencoder.to_model_range(images)
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, :, 5, 9].tolist() == [1.0, -1.0, 1.0]


def test_cosine_optimizer_minimises() -> None:
    value = torch.nn.Parameter(torch.tensor([3.0]))
    with autoencoder.cosine_optimizer([value], 0.1, 100, "test") as step:
        for _ in range(100):
            step((value - 1.0).square().sum())
    assert value.item() == pytest.approx(1.0, abs=0.05)

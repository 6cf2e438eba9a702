"""A micro UNet in float64 and pairs for it."""

from __future__ import annotations

import pytest
import torch

from sdpo.families.base import Conditioning
from sdpo.forward import NoisedPairs


@pytest.fixture(scope="session")
def double_unet():
    """A micro SD1.5 UNet in float64, its weights shaken so that no layer is at zero."""
    from sdpo.tinyworld.architecture import build_pipeline

    torch.manual_seed(0)
    unet = build_pipeline("sd15", "micro").unet.double().eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet


@pytest.fixture(scope="session")
def pairs(double_unet):
    """Three pairs at timesteps far apart, float64; a pair shares timestep, noise and caption."""
    g = torch.Generator().manual_seed(1)
    size = (3, double_unet.config.in_channels, 16, 16)
    noise = torch.randn(size, generator=g, dtype=torch.float64)
    images = torch.randn((2, *size), generator=g, dtype=torch.float64)
    hidden = torch.randn(
        (3, 5, double_unet.config.cross_attention_dim), generator=g, dtype=torch.float64
    )
    return NoisedPairs(
        noisy=torch.cat([noise + 0.5 * images[0], noise + 0.5 * images[1]]),
        timesteps=torch.tensor([30, 400, 900]).repeat(2),
        target=noise.repeat(2, 1, 1, 1),
        conditioning=Conditioning(hidden.repeat(2, 1, 1)),
    )

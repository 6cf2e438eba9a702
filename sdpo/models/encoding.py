"""From a batch of pairs to latents and conditions."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Family, Frozen
from sdpo.models.noise import NoiseProcess


class Encoder(Protocol):
    """What the training step asks of a base about images, captions and noise."""

    process: NoiseProcess
    latent_shape: tuple[int, int, int]  # (C, r, r)
    device: torch.device

    def latents(self, batch: Any, noise: Tensor) -> Tensor:
        """Encode the images: normalised latents (2B, C, r, r), float32, winners first. `noise`, of
        that shape, standard normal, draws them from the VAE's posterior."""

    def conditions(self, batch: Any) -> Conditions:
        """Encode the B captions to what the model is told."""

    def frozen_parts(self) -> Frozen:
        """Give VAE, text encoders and tokenizers, for drawing samples."""


class ModelEncoder:
    """Encodes pixels and captions of a `PairBatch` by the frozen models."""

    def __init__(
        self, family: Family, frozen: Frozen, resolution: int, device: torch.device
    ) -> None:
        self.family, self.frozen = family, frozen
        self.resolution, self.device = resolution, device
        self.process = family.process(frozen.scheduler)
        self.latent_shape = family.latent_shape(frozen, resolution)

    def latents(self, batch: Any, noise: Tensor) -> Tensor:
        """Encode pixels (2B, 3, R, R); see `Encoder.latents`."""
        return self.family.encode_images(self.frozen, batch.pixels.to(self.device), noise)

    def conditions(self, batch: Any) -> Conditions:
        """Encode the B captions; see `Encoder.conditions`."""
        return self.family.encode_captions(self.frozen, batch.captions, self.resolution)

    def frozen_parts(self) -> Frozen:
        """Give the models in use."""
        return self.frozen

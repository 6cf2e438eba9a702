"""From a batch of pairs to latents and conditions: by the frozen models, or as kept in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sdpo.models.base import (
    Conditioning,
    Family,
    Frozen,
    ModelSource,
    load_frozen_as,
    sample_posterior,
)

if TYPE_CHECKING:
    from sdpo.data.latents.pairs import EncodedBatch
    from sdpo.data.latents.store import LatentCache
    from sdpo.data.pairs import PairBatch


class Encoder(Protocol):
    """What the training step needs to know about images and captions, and the noise schedule."""

    schedule: Any  # DDPMScheduler
    latent_shape: tuple[int, int, int]  # (C, r, r)
    device: torch.device

    def latents(self, batch: Any, noise: Tensor) -> Tensor:
        """Scaled latents (2B, C, r, r), float32, winners first; `noise` of that shape, standard
        normal, draws them from the VAE's posterior."""

    def conditioning(self, batch: Any) -> Conditioning:
        """What the UNet is told about the B captions."""

    def frozen_parts(self) -> Frozen:
        """VAE, text encoders and tokenizers, for drawing samples."""


class ModelEncoder:
    """Encodes pixels and captions of a `PairBatch` by the frozen models."""

    def __init__(
        self, family: Family, frozen: Frozen, resolution: int, device: torch.device
    ) -> None:
        self.family, self.frozen = family, frozen
        self.resolution, self.device = resolution, device
        self.schedule = frozen.scheduler
        self.latent_shape = family.latent_shape(frozen, resolution)

    def latents(self, batch: PairBatch, noise: Tensor) -> Tensor:
        """As `Encoder` says."""
        return self.family.encode_images(self.frozen, batch.pixels.to(self.device), noise)

    def conditioning(self, batch: PairBatch) -> Conditioning:
        """As `Encoder` says."""
        return self.family.encode_captions(self.frozen, batch.captions, self.resolution)

    def frozen_parts(self) -> Frozen:
        """The models in use."""
        return self.frozen


@dataclass(frozen=True)
class CachedEncoder:
    """Takes what an `EncodedBatch` brings along; neither VAE nor text encoders are in memory."""

    family: Family
    source: ModelSource
    schedule: Any
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float | None
    resolution: int
    device: torch.device
    dtype: torch.dtype  # of the run, in which the text encoders would answer

    def latents(self, batch: EncodedBatch, noise: Tensor) -> Tensor:
        """As `Encoder` says."""
        mean, std = batch.moments.to(self.device).unbind(1)
        return sample_posterior(mean, std, noise, self.scaling_factor, self.shift_factor)

    def conditioning(self, batch: EncodedBatch) -> Conditioning:
        """As `Encoder` says."""
        text = {k: v.to(self.device, self.dtype) for k, v in batch.text.items()}
        return self.family.conditioning(text, self.resolution)

    def frozen_parts(self) -> Frozen:
        """The models, loaded for this occasion; whoever asked lets go of them."""
        return load_frozen_as(self.family, self.source, self.device, self.dtype)


def build_encoder(
    family: Family,
    source: ModelSource,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    cache: LatentCache | None = None,
) -> Encoder:
    """The encoder of a run of `dtype`: the cache's where there is one, else the loaded models.

    Raises:
        UserError: a model is not to be had.
    """
    if cache is None:
        frozen = load_frozen_as(family, source, device, dtype)
        return ModelEncoder(family, frozen, resolution, device)
    about = cache.about
    return CachedEncoder(
        family=family,
        source=source,
        schedule=family.load_scheduler(source),
        latent_shape=tuple(about["latent_shape"]),
        scaling_factor=about["scaling_factor"],
        shift_factor=about["shift_factor"],
        resolution=resolution,
        device=device,
        dtype=dtype,
    )

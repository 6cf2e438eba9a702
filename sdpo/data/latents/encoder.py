"""Encode the batches of a run, from a cache of encodings or by the models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo.data.latents.store import LatentCache
from sdpo.data.pairs import EncodedBatch
from sdpo.models.base import Conditions, Family, Frozen, ModelSource, load_frozen_as
from sdpo.models.encoding import Encoder, ModelEncoder, pair_conditions
from sdpo.models.noise import NoiseProcess


@dataclass
class CachedEncoder:
    """Take what an `EncodedBatch` brings along; neither VAE nor text encoders are in memory."""

    family: Family
    source: ModelSource
    process: NoiseProcess
    vae: Mapping[str, Any]  # of its configuration what `Family.normalise` needs
    resolution: int
    device: torch.device
    dtype: torch.dtype  # of the run, in which the text encoders would answer

    def latent_shape(self, batch: EncodedBatch) -> tuple[int, int, int]:
        """Give (C, h, w); see `Encoder.latent_shape`."""
        channels, height, width = batch.moments.shape[2:]
        return channels, height, width

    def latents(self, batch: EncodedBatch, noise: Tensor) -> Tensor:
        """Draw latents from the cached posteriors; see `Encoder.latents`."""
        mean, std = batch.moments.to(self.device).unbind(1)
        return self.family.sample_posterior(mean, std, noise, self.vae)

    def conditions(self, batch: EncodedBatch) -> Conditions:
        """Make conditions of the cached texts; see `Encoder.conditions`."""
        text = {k: v.to(self.device, self.dtype) for k, v in batch.text.items()}
        return pair_conditions(self.family, text, batch, self.resolution)

    @contextmanager
    def frozen_parts(self) -> Iterator[Frozen]:
        """Load the models for this occasion."""
        yield load_frozen_as(self.family, self.source, self.device, self.dtype)


def build_encoder(
    family: Family,
    source: ModelSource,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    cache: LatentCache | None = None,
    offload_text: bool = False,
) -> Encoder:
    """Build the encoder of a run of `dtype`: the cache's where there is one, else the loaded
    models, whose text encoders lie in the host's memory with `offload_text`.

    Raises:
        UserError: a model is not to be had.
    """
    if cache is None:
        frozen = load_frozen_as(family, source, device, dtype)
        return ModelEncoder(family, frozen, resolution, device, offload_text)
    return CachedEncoder(
        family=family,
        source=source,
        process=family.process(family.load_scheduler(source), tuple(cache.about["latent_shape"])),
        vae=cache.about,
        resolution=resolution,
        device=device,
        dtype=dtype,
    )

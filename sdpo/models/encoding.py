"""From a batch of pairs to latents and conditions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdpo.models.base import Conditions, Family, Frozen, repeat, square_sizes
from sdpo.models.noise import NoiseProcess
from sdpo.models.offload import Offloaded


class Encoder(Protocol):
    """What the training step asks of a base about images, captions and noise."""

    process: NoiseProcess
    device: torch.device

    def latent_shape(self, batch: Any) -> tuple[int, int, int]:
        """Give (C, h, w) of the latents of a batch's images."""

    def latents(self, batch: Any, noise: Tensor) -> Tensor:
        """Encode the images: normalised latents (2B, C, h, w), float32, winners first. `noise`, of
        that shape, standard normal, draws them from the VAE's posterior."""

    def conditions(self, batch: Any) -> Conditions:
        """Encode the B captions to what the model is told of the 2B images, winners first."""

    def frozen_parts(self) -> AbstractContextManager[Frozen]:
        """Have VAE, text encoders and tokenizers on the device within it, for drawing samples."""


def pair_conditions(
    family: Family, text: dict[str, Tensor], batch: Any, resolution: int
) -> Conditions:
    """Make the conditions of 2B images, winners first, of B captions' `text`. A batch without sizes
    is of squares of `resolution` pixels."""
    sizes = batch.sizes if batch.sizes is not None else square_sizes(resolution, 2 * len(batch))
    return family.conditions(repeat(text, 2), sizes)


class ModelEncoder:
    """Encodes pixels and captions of a `PairBatch` by the frozen models; with `offload_text` the
    text encoders are on the device only meanwhile."""

    def __init__(
        self,
        family: Family,
        frozen: Frozen,
        resolution: int,
        device: torch.device,
        offload_text: bool = False,
    ) -> None:
        self.family, self.frozen = family, frozen
        self.resolution, self.device = resolution, device
        self.text: Offloaded | None = None
        if offload_text:
            self.text = Offloaded(nn.ModuleList(frozen.text_encoders).to("cpu"), device)
        square = family.latent_shape(frozen, resolution)
        self.process = family.process(frozen.scheduler, square)

    def latent_shape(self, batch: Any) -> tuple[int, int, int]:
        """Give (C, h, w); see `Encoder.latent_shape`."""
        return self.family.latent_shape(self.frozen, *batch.pixels.shape[2:])

    def latents(self, batch: Any, noise: Tensor) -> Tensor:
        """Encode pixels (2B, 3, H, W); see `Encoder.latents`."""
        return self.family.encode_images(self.frozen, batch.pixels.to(self.device), noise)

    def conditions(self, batch: Any) -> Conditions:
        """Encode the B captions; see `Encoder.conditions`."""
        with self.frozen_parts() as frozen:
            text = self.family.encode_text(frozen, batch.captions)
        return pair_conditions(self.family, text, batch, self.resolution)

    @contextmanager
    def frozen_parts(self) -> Iterator[Frozen]:
        """Give the models in use."""
        with self.text.on_device() if self.text else nullcontext():
            yield self.frozen

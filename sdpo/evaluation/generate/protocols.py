"""How images are sampled from a prompt: as published, or as a plain diffusers pipeline does it.

A protocol maps prompts and their indices to images. An image depends on its prompt, its index and
the settings; not, beyond float rounding, on what else is in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdpo.models.base import Conditions, Family, Frozen, ModelSource, joined, repeat

DECODED_PIXELS = 2**21  # at a time: 8 images of 512 px


@dataclass(frozen=True)
class Sampling:
    """The numbers of a protocol. `cfg` is as each protocol defines it; `resolution` in pixels."""

    steps: int
    cfg: float
    seed: int
    resolution: int
    dtype: torch.dtype


class Protocol(ABC):
    """A way of sampling, with its models on their device."""

    def __init__(
        self,
        family: Family,
        unet: nn.Module,
        frozen: Frozen,
        source: ModelSource,
        sampling: Sampling,
        device: torch.device,
    ) -> None:
        self.family, self.frozen, self.sampling, self.device = family, frozen, sampling, device
        self.unet = unet.to(device, sampling.dtype).eval()
        frozen.to(device, sampling.dtype, self.vae_dtype())
        self.prepare(source)

    @abstractmethod
    def vae_dtype(self) -> torch.dtype:
        """What the VAE decodes in."""

    @abstractmethod
    def prepare(self, source: ModelSource) -> None:
        """Build the scheduler and whatever else is the same for all prompts."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
        """One image a prompt; `indices` are the prompts' places in the suite."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings that the flags do not show: scheduler, guidance in diffusers' convention."""

    def seed_of(self, index: int) -> int:
        """The seed of the noise of the prompt at `index`."""
        return self.sampling.seed


class Paper(Protocol):
    """The published evaluation.

    Euler discrete scheduler from the base's own configuration; cond + c * (cond - uncond), which
    is diffusers' guidance scale c + 1; the unconditional half is the encoding of ""; one noise for
    all prompts, drawn on the device in the models' dtype; VAE in float32.
    """

    def vae_dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def prepare(self, source: ModelSource) -> None:
        """Scheduler, noise (1, C, r, r) and the unconditional embedding."""
        from diffusers import EulerDiscreteScheduler

        sampling = self.sampling
        config = self.family.load_sampler(source).config
        self.scheduler = EulerDiscreteScheduler.from_config(config)
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        shape = (1, *self.family.latent_shape(self.frozen, sampling.resolution))
        self.noise = torch.randn(
            shape, generator=generator, device=self.device, dtype=sampling.dtype
        )
        self.unconditional = self.encode([""])

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """What the UNet is told about prompts."""
        return self.family.encode_captions(self.frozen, list(prompts), self.sampling.resolution)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
        """See `Protocol.__call__`; the indices play no part."""
        count, scheduler = len(prompts), self.scheduler
        both = joined([repeat(self.unconditional, count), self.encode(prompts)])
        scheduler.set_timesteps(self.sampling.steps, device=self.device)
        latents = self.noise.expand(count, -1, -1, -1) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            output = self.family.predict(self.unet, inputs, timestep, both)
            uncond, cond = output.chunk(2)
            guided = cond + self.sampling.cfg * (cond - uncond)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        return self.decode(latents)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, r, r) to images."""
        vae = self.frozen.vae
        scaled = self.family.denormalise(latents.to(vae.dtype), vae.config)
        at_once = max(1, DECODED_PIXELS // self.sampling.resolution**2)
        decoded = [vae.decode(part).sample for part in scaled.split(at_once)]
        pixels = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
        return [
            Image.fromarray(image)
            for image in (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        ]

    def describe(self) -> dict[str, Any]:
        """See `Protocol.describe`."""
        return {
            "scheduler": "EulerDiscreteScheduler",
            "scheduler_config": plain_config(self.scheduler.config),
            "guidance_scale_diffusers": self.sampling.cfg + 1,
            "noise": "one for all prompts, drawn on the device",
            "vae_dtype": str(self.frozen.vae.dtype),
        }


class Diffusers(Protocol):
    """What `StableDiffusionPipeline(prompt, generator=torch.Generator().manual_seed(seed + index))`
    gives: the base's own scheduler, diffusers' guidance, a noise of its own for every prompt."""

    def vae_dtype(self) -> torch.dtype:
        """The models', or float32 for a VAE that overflows in it."""
        return self.family.vae_dtype(self.frozen.vae, self.sampling.dtype)

    def prepare(self, source: ModelSource) -> None:
        """The pipeline."""
        self.pipeline = self.family.pipeline(self.unet, self.frozen, source)
        self.pipeline.set_progress_bar_config(disable=True)

    def seed_of(self, index: int) -> int:
        """Another for every prompt."""
        return self.sampling.seed + index

    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
        """See `Protocol.__call__`; noise is drawn on the CPU, so it does not depend on the
        device."""
        return self.pipeline(
            list(prompts),
            height=self.sampling.resolution,
            width=self.sampling.resolution,
            num_inference_steps=self.sampling.steps,
            guidance_scale=self.sampling.cfg,
            generator=[torch.Generator().manual_seed(self.seed_of(i)) for i in indices],
        ).images

    def describe(self) -> dict[str, Any]:
        """See `Protocol.describe`."""
        scheduler = self.pipeline.scheduler
        return {
            "scheduler": type(scheduler).__name__,
            "scheduler_config": plain_config(scheduler.config),
            "guidance_scale_diffusers": self.sampling.cfg,
            "noise": "seed + index for every prompt, drawn on the CPU",
            "vae_dtype": str(self.frozen.vae.dtype),
        }


PROTOCOLS: dict[str, type[Protocol]] = {"paper": Paper, "diffusers": Diffusers}


def plain_config(config: Any) -> dict[str, Any]:
    """A scheduler's configuration without what diffusers keeps for itself, ready for JSON."""
    return {k: v for k, v in sorted(dict(config).items()) if not k.startswith("_")}

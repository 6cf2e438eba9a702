"""How images are sampled from a prompt: as published, or as a plain diffusers pipeline does it.

A protocol maps prompts and their indices to images. An image depends on its prompt, its index and
the settings; not, beyond float rounding, on what else is in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from sdpo.common.errors import UserError
from sdpo.models.base import Conditions, Family, Frozen, ModelSource, joined, repeat
from sdpo.models.offload import Offloaded

DECODED_PIXELS = 2**21  # at a time: 8 images of 512 px


@dataclass(frozen=True)
class Sampling:
    """Holds a protocol's numbers. `cfg` is as each protocol defines it; `resolution` in pixels."""

    steps: int
    cfg: float
    seed: int
    resolution: int
    dtype: torch.dtype


class Protocol(ABC):
    """Samples images from prompts by models that lie on `device`; with `offload_text` the text
    encoders lie in the host's memory, and are there only while prompts are encoded.

    Class attributes:
        noise_used: where an image's noise comes from, in words.
    """

    noise_used: ClassVar[str]

    def __init__(
        self,
        family: Family,
        unet: nn.Module,
        frozen: Frozen,
        source: ModelSource,
        sampling: Sampling,
        device: torch.device,
        offload_text: bool = False,
    ) -> None:
        self.family, self.frozen, self.sampling, self.device = family, frozen, sampling, device
        self.offload_text = offload_text
        self.scheduler: Any = None
        self.vae: Any = frozen.vae
        # The device need not have room for all parts at once.
        home = torch.device("cpu") if offload_text else device
        self.unet: Any = unet.to(home, sampling.dtype).eval()
        frozen.to(home, sampling.dtype, self.vae_dtype())
        self.prepare(source)

    @abstractmethod
    def vae_dtype(self) -> torch.dtype:
        """Choose the dtype that the VAE decodes in."""

    @abstractmethod
    def prepare(self, source: ModelSource) -> None:
        """Build `scheduler` and whatever else is the same for all prompts, and bring to the device
        what belongs there of parts that are offloaded."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
        """Make an image of every prompt; `indices` are the prompts' places in the suite."""

    @abstractmethod
    def guidance_scale(self) -> float:
        """Convert the guidance c to diffusers' convention."""

    def seed_of(self, index: int) -> int:
        """Give the seed of the noise of the prompt at `index`."""
        return self.sampling.seed

    def describe(self) -> dict[str, Any]:
        """List the settings that the flags do not show, ready for JSON."""
        config = sorted(dict(self.scheduler.config).items())
        return {
            "scheduler": type(self.scheduler).__name__,
            # Without what diffusers keeps for itself.
            "scheduler_config": {k: v for k, v in config if not k.startswith("_")},
            "guidance_scale_diffusers": self.guidance_scale(),
            "noise": self.noise_used,
            "vae_dtype": str(self.vae.dtype),
        }


class Paper(Protocol):
    """Samples as the published evaluation does.

    Euler discrete scheduler from the base's own configuration; cond + c * (cond - uncond), which
    is diffusers' guidance scale c + 1; the unconditional half is the encoding of ""; one noise for
    all prompts, drawn on the device in the models' dtype; VAE in float32.
    """

    noise_used = "one for all prompts, drawn on the device"

    def vae_dtype(self) -> torch.dtype:
        """Choose float32."""
        return torch.float32

    def guidance_scale(self) -> float:
        """Add 1 to c: cond + c (cond - uncond) = uncond + (c + 1) (cond - uncond)."""
        return self.sampling.cfg + 1

    def prepare(self, source: ModelSource) -> None:
        """Build the scheduler, the noise (1, C, r, r) and the unconditional embedding."""
        from diffusers import EulerDiscreteScheduler

        sampling = self.sampling
        self.text: Offloaded | None = None
        if self.offload_text:
            self.text = Offloaded(nn.ModuleList(self.frozen.text_encoders), self.device)
            self.unet.to(self.device)
            self.vae.to(self.device)
        config = self.family.load_sampler(source).config
        self.scheduler = EulerDiscreteScheduler.from_config(config)
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        shape = (1, *self.family.latent_shape(self.frozen, sampling.resolution))
        self.noise = torch.randn(
            shape, generator=generator, device=self.device, dtype=sampling.dtype
        )
        self.unconditional = self.encode([""])

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Encode prompts to the UNet's conditions."""
        with self.text.on_device() if self.text else nullcontext():
            return self.family.encode_captions(self.frozen, list(prompts), self.sampling.resolution)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
        """Make an image of every prompt by Euler's method; the indices play no part."""
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
        check_finite(latents, indices)
        return self.decode(latents)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents (B, C, r, r) to B images."""
        scaled = self.family.denormalise(latents.to(self.vae.dtype), self.vae.config)
        at_once = max(1, DECODED_PIXELS // self.sampling.resolution**2)
        decoded = [self.vae.decode(part).sample for part in scaled.split(at_once)]
        pixels = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
        levels = (pixels * 255).round().byte().permute(0, 2, 3, 1)
        return [Image.fromarray(image) for image in levels.cpu().numpy()]


class Diffusers(Protocol):
    """Samples as `StableDiffusionPipeline(prompt, generator=torch.Generator().manual_seed(seed +
    index))`: the base's own scheduler, diffusers' guidance, a noise of its own for every prompt."""

    noise_used = "seed + index for every prompt, drawn on the CPU"

    def vae_dtype(self) -> torch.dtype:
        """Choose the models' dtype, or float32 for a VAE that overflows in it."""
        return self.family.vae_dtype(self.vae, self.sampling.dtype)

    def guidance_scale(self) -> float:
        """Give c as it is: uncond + c (cond - uncond)."""
        return self.sampling.cfg

    def prepare(self, source: ModelSource) -> None:
        """Build the pipeline; offloaded, its parts take turns on the device, as diffusers does
        it."""
        self.pipeline = self.family.pipeline(self.unet, self.frozen, source)
        if self.offload_text and self.device.type != "cpu":
            self.pipeline.enable_model_cpu_offload(device=self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = self.pipeline.scheduler

    def seed_of(self, index: int) -> int:
        """Give every prompt a seed of its own."""
        return self.sampling.seed + index

    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
        """Make an image of every prompt, its noise drawn on the CPU, whatever the device."""
        pixels = self.pipeline(
            **self.family.call_options(self.pipeline, prompts, self.sampling.cfg),
            height=self.sampling.resolution,
            width=self.sampling.resolution,
            num_inference_steps=self.sampling.steps,
            generator=[torch.Generator().manual_seed(self.seed_of(i)) for i in indices],
            output_type="np",
        ).images
        check_finite(torch.from_numpy(pixels), indices)
        return self.pipeline.image_processor.numpy_to_pil(pixels)


def check_finite(made: Tensor, indices: Sequence[int]) -> None:
    """Refuse latents or pixels, (B, ...), that would be black images.

    Raises:
        UserError: some are not finite.
    """
    bad = [i for i, one in zip(indices, made, strict=True) if not one.isfinite().all()]
    if bad:
        raise UserError(
            f"--unet: what it made of prompt {bad[0]} is not finite; is the UNet broken, or does "
            "it overflow in --dtype (fp32 does not)?"
        )


PROTOCOLS: dict[str, type[Protocol]] = {"paper": Paper, "diffusers": Diffusers}

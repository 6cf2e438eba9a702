"""What a model family answers: what to load, how captions are encoded, what the UNet takes."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line
from sdpo.models.loading import (
    from_pretrained,
    is_weights_file,
    load_strictly,
    read_state_dict,
)
from sdpo.models.locations import check_family

BASE_FLAG = "--pretrained_model_name_or_path"
VAE_FLAG = "--pretrained_vae_model_name_or_path"


@dataclass
class Frozen:
    """The parts that are not trained. `text_encoders` and `tokenizers` go together."""

    vae: nn.Module
    text_encoders: list[nn.Module]
    tokenizers: list[Any]
    scheduler: Any  # DDPMScheduler: the training noise schedule

    def to(self, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Frozen:
        """Move to a device; in place, returns self."""
        self.vae.to(device, vae_dtype)
        for encoder in self.text_encoders:
            encoder.to(device, dtype)
        return self


@dataclass
class Conditioning:
    """What the UNet is told about B captions: `hidden` (B, tokens, width), and, where the family
    has it, `added` as diffusers' `added_cond_kwargs`, each (B, ...)."""

    hidden: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    def repeat(self, times: int) -> Conditioning:
        """The same conditions `times` over, (times * B, ...): winners, then losers."""
        return Conditioning(
            self.hidden.repeat(times, 1, 1),
            {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in self.added.items()},
        )

    def followed_by(self, other: Conditioning) -> Conditioning:
        """These B conditions, then the other's, as one batch."""
        return Conditioning(
            torch.cat([self.hidden, other.hidden]),
            {k: torch.cat([v, other.added[k]]) for k, v in self.added.items()},
        )

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `UNet2DConditionModel.forward`."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.hidden}
        if self.added:
            kwargs["added_cond_kwargs"] = self.added
        return kwargs


@dataclass(frozen=True)
class ModelSource:
    """Where a run's models come from; the same words as train.py's flags.

    `unet_flag` is the flag that `unet_init` came from, for messages."""

    base: str
    vae: str | None = None
    revision: str | None = None
    unet_init: str | None = None
    cache_dir: str | None = None
    unet_flag: str = "--unet_init"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelSource:
        """What train.py's flags name."""
        return cls(
            base=args.pretrained_model_name_or_path,
            vae=args.pretrained_vae_model_name_or_path,
            revision=args.revision,
            unet_init=args.unet_init,
            cache_dir=args.cache_dir,
        )


class Family(ABC):
    """One kind of base model. Subclasses hold what differs, as data or a method."""

    name: ClassVar[str]
    sdxl: ClassVar[bool]
    default_resolution: ClassVar[int]
    sample_guidance: ClassVar[float]

    def load_unet_config(self, source: ModelSource) -> dict[str, Any]:
        """The base's UNet config, checked to be of this family.

        Raises:
            UserError: not to be had, of another family, or not trained to predict noise.
        """
        from diffusers import UNet2DConditionModel

        try:
            config = UNet2DConditionModel.load_config(
                source.base,
                subfolder="unet",
                revision=source.revision,
                cache_dir=source.cache_dir,
            )
        except Exception as error:
            raise UserError(
                f"{BASE_FLAG}: cannot load unet/config.json of {source.base} "
                f"({first_line(error)}); give a hub id this machine can reach or has in "
                "--cache_dir, or a local directory in diffusers layout"
            ) from error
        check_family(config, self.sdxl, f"{BASE_FLAG} {source.base}")
        return config

    def load_unet(self, source: ModelSource) -> nn.Module:
        """The UNet a run starts from, float32, from `unet_init` where given, else the base.

        Raises:
            UserError: not to be had, or of another family.
        """
        from diffusers import UNet2DConditionModel

        config = self.load_unet_config(source)
        init, flag = source.unet_init, source.unet_flag
        if init is None:
            return self._unet_from_pretrained(BASE_FLAG, source.base, "unet", source)
        if is_weights_file(init):
            unet = UNet2DConditionModel.from_config(config)
            load_strictly(unet, read_state_dict(Path(init)), f"{flag} {init}")
            return unet
        plain = (Path(init) / "config.json").is_file()
        subfolder = None if plain else "unet"
        unet = self._unet_from_pretrained(flag, init, subfolder, source)
        check_family(dict(unet.config), self.sdxl, f"{flag} {init}")
        return unet

    def _unet_from_pretrained(
        self, flag: str, name: str, subfolder: str | None, source: ModelSource
    ) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return from_pretrained(
            UNet2DConditionModel,
            flag,
            name,
            subfolder=subfolder,
            revision=source.revision if flag == BASE_FLAG else None,
            cache_dir=source.cache_dir,
        ).float()

    def load_frozen(self, source: ModelSource) -> Frozen:
        """VAE, text encoders, tokenizers and noise schedule, float32, without gradients.

        Raises:
            UserError: one of them is not to be had, or the model does not predict noise.
        """
        from diffusers import AutoencoderKL
        from transformers import CLIPTokenizer

        common = {"revision": source.revision, "cache_dir": source.cache_dir}
        if source.vae:
            vae = from_pretrained(AutoencoderKL, VAE_FLAG, source.vae, cache_dir=source.cache_dir)
        else:
            vae = from_pretrained(AutoencoderKL, BASE_FLAG, source.base, subfolder="vae", **common)
        scheduler = self.load_scheduler(source)
        encoders = [
            from_pretrained(cls, BASE_FLAG, source.base, subfolder=part, **common)
            for part, cls in self._text_encoder_classes().items()
        ]
        tokenizers = [
            from_pretrained(CLIPTokenizer, BASE_FLAG, source.base, subfolder=part, **common)
            for part in self._tokenizer_parts()
        ]
        # Libraries differ in whether they load a file's dtype, and in the name of that argument.
        for module in (vae, *encoders):
            module.float().requires_grad_(False).eval()
        return Frozen(vae, encoders, tokenizers, scheduler)

    def load_scheduler(self, source: ModelSource) -> Any:
        """The training noise schedule alone, a `DDPMScheduler`.

        Raises:
            UserError: not to be had, or the model does not predict noise.
        """
        from diffusers import DDPMScheduler

        scheduler = from_pretrained(
            DDPMScheduler,
            BASE_FLAG,
            source.base,
            subfolder="scheduler",
            revision=source.revision,
            cache_dir=source.cache_dir,
        )
        if scheduler.config.prediction_type != "epsilon":
            raise UserError(
                f"{BASE_FLAG}: {source.base} predicts {scheduler.config.prediction_type}; the "
                "losses are defined for models that predict noise (epsilon)"
            )
        return scheduler

    def vae_dtype(self, vae: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """The dtype to run the VAE in, given that of the run."""
        return dtype

    @abstractmethod
    def _text_encoder_classes(self) -> dict[str, Any]:
        """Subfolder to class, in the order in which their outputs are joined."""

    @abstractmethod
    def _tokenizer_parts(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers, in the same order."""

    def text_parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Subfolders of the text encoders, and of their tokenizers."""
        return tuple(self._text_encoder_classes()), self._tokenizer_parts()

    @abstractmethod
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """What the text encoders say of B captions: `hidden` (B, tokens, width) and, where the
        family has it, `pooled` (B, width)."""

    @abstractmethod
    def conditioning(self, text: dict[str, Tensor], resolution: int) -> Conditioning:
        """From `encode_text`'s output to what the UNet takes, for training at `resolution` pixels
        square."""

    def encode_captions(self, frozen: Frozen, captions: list[str], resolution: int) -> Conditioning:
        """Captions to what the UNet takes, for training at `resolution` pixels square."""
        return self.conditioning(self.encode_text(frozen, captions), resolution)

    @abstractmethod
    def pipeline(self, unet: nn.Module, frozen: Frozen, source: ModelSource) -> Any:
        """A diffusers pipeline around these very modules, with the base's own sampler."""

    @torch.no_grad()
    def encode_images(self, frozen: Frozen, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels (N, 3, R, R) in [-1, 1] to scaled latents (N, C, r, r), float32.

        `noise` (N, C, r, r), standard normal, draws the sample from the VAE's posterior.
        """
        config = frozen.vae.config
        mean, std = self.encode_posterior(frozen, pixels)
        return sample_posterior(mean, std, noise, config.scaling_factor, config.shift_factor)

    @torch.no_grad()
    def encode_posterior(self, frozen: Frozen, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, each (N, C, r, r) in its dtype, of
        pixels (N, 3, R, R) in [-1, 1]."""
        vae = frozen.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def latent_shape(self, frozen: Frozen, resolution: int) -> tuple[int, int, int]:
        """(C, r, r) of the latents of a square image."""
        config = frozen.vae.config
        side = resolution // 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, side, side

    def load_sampler(self, source: ModelSource) -> Any:
        """The base's own sampling scheduler, of the class that its pipeline names."""
        import diffusers

        config = diffusers.DDPMScheduler.load_config(
            source.base,
            subfolder="scheduler",
            revision=source.revision,
            cache_dir=source.cache_dir,
        )
        return getattr(diffusers, config["_class_name"]).from_config(config)


def load_frozen_as(
    family: Family, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> Frozen:
    """The frozen parts on `device`, in a run's `dtype` (the VAE in what it can bear).

    Raises:
        UserError: one of them is not to be had.
    """
    frozen = family.load_frozen(source)
    return frozen.to(device, dtype, family.vae_dtype(frozen.vae, dtype))


def sample_posterior(
    mean: Tensor, std: Tensor, noise: Tensor, scaling_factor: float, shift_factor: float | None
) -> Tensor:
    """Scaled latents (N, C, r, r), float32, from a VAE's posterior and standard normal noise."""
    sample = mean.float() + std.float() * noise
    return ((sample - (shift_factor or 0.0)) * scaling_factor).contiguous()


def tokenize(tokenizer: Any, captions: list[str], device: torch.device) -> Tensor:
    """Captions to padded, truncated token ids, (B, model_max_length)."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)

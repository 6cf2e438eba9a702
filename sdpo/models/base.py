"""What a model family answers: what to load, how captions are encoded, how its model is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.common.errors import UserError, first_line
from sdpo.config.families import FAMILIES
from sdpo.models.checks import (
    BASE_FLAG,
    VAE_FLAG,
    Config,
    Reader,
    check_base,
    check_schedule,
    check_start,
)
from sdpo.models.loading import (
    ADVICE,
    from_pretrained,
    is_weights_file,
    load_strictly,
    read_state_dict,
)
from sdpo.models.locations import check_family, read_config, reader
from sdpo.models.lora_file import merge_lora
from sdpo.models.lora_text import merge_text_lora
from sdpo.models.noise import Diffusion, NoiseProcess
from sdpo.models.single_file import load_part, unet_weights

if TYPE_CHECKING:
    from sdpo.config import TrainConfig


@dataclass
class Frozen:
    """The parts that are not trained. `text_encoders` and `tokenizers` go together."""

    vae: Any  # AutoencoderKL
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any  # DDPMScheduler: the training noise schedule

    def to(self, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Frozen:
        """Move to a device; in place, returns self."""
        self.vae.to(device, vae_dtype)
        for encoder in self.text_encoders:
            encoder.to(device, dtype)
        return self


# What a model is told besides x_t and t, of B captions: tensors (B, ...) by the family's names.
Conditions = dict[str, Tensor]


def repeat(conditions: Conditions, times: int) -> Conditions:
    """Repeat conditions `times` over, (times * B, ...): winners, then losers."""
    return {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in conditions.items()}


def square_sizes(resolution: int, count: int) -> Tensor:
    """Give the sizes (count, 6) of square images that are taken whole; see `Family.conditions`."""
    return torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]]).repeat(count, 1)


def joined(parts: Sequence[Conditions]) -> Conditions:
    """Join the conditions of several batches to those of one."""
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


@dataclass(frozen=True)
class ModelSource:
    """Where a run's models come from; the same words as train.py's flags.

    `weights` is a single-file checkpoint in the original layout that has the base's weights; `base`
    then has the configurations and tokenizers. `lora` is a file that is added into the weights of
    the UNet and, where it adapts them, of the text encoders. `unet_flag` and `lora_flag` are the
    flags that `unet_init` and `lora` came from, for messages."""

    base: str
    vae: str | None = None
    revision: str | None = None
    unet_init: str | None = None
    cache_dir: str | None = None
    unet_flag: str = "--unet_init"
    weights: str | None = None
    lora: str | None = None
    lora_flag: str = "--lora"

    @classmethod
    def of(cls, config: TrainConfig) -> ModelSource:
        """Name the places that a run's settings name."""
        model = config.model
        base, weights = place_of_base(
            model.pretrained_model_name_or_path, model.single_file_config, model.sdxl
        )
        return cls(
            base=base,
            weights=weights,
            vae=model.pretrained_vae_model_name_or_path,
            revision=model.revision,
            unet_init=model.unet_init,
            cache_dir=config.data.cache_dir,
        )


def place_of_base(name: str, config: str | None, sdxl: bool) -> tuple[str, str | None]:
    """Say where a base's configurations are, and the single file of its weights, if it is one.

    Args:
        name: of the base: a hub id, a directory or a file.
        config: of --single_file_config.
        sdxl: its family.
    """
    if not (is_weights_file(name) and Path(name).is_file()):
        return name, None
    return config or FAMILIES["sdxl" if sdxl else "sd15"].base, name


class Family(ABC):
    """One kind of base model. Subclasses hold what differs, as data or a method."""

    name: ClassVar[str]
    sdxl: ClassVar[bool]
    default_resolution: ClassVar[int]
    sample_guidance: ClassVar[float]

    def load_unet_config(self, source: ModelSource) -> dict[str, Any]:
        """Read the base's UNet config, checked to be of this family.

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
            if source.weights:
                raise UserError(
                    f"{BASE_FLAG}: {source.weights} holds weights alone, and the configurations "
                    f"and tokenizers of {source.base} cannot be had ({first_line(error)}); give "
                    "--single_file_config DIR_OR_ID of a base of its family in diffusers layout"
                ) from error
            raise UserError(
                f"{BASE_FLAG}: cannot load unet/config.json of {source.base} "
                f"({first_line(error)}); give a hub id this machine can reach or has in "
                "--cache_dir, or a local directory in diffusers layout"
            ) from error
        check_family(config, self.sdxl, f"{BASE_FLAG} {source.base}")
        return config

    def check(self, source: ModelSource) -> None:
        """Check by its configuration files that a base is what training, evaluation and export
        need; see `sdpo.models.checks`. No weights are read.

        Raises:
            UserError: a file is not to be had, or says that the base is another kind of model.
        """
        self.load_unet_config(source)
        read = _file_reader(source.base, source.revision, source.cache_dir)
        vae = None
        if source.vae:
            # {} where it is not to be had: loading it says why.
            vae = _file_reader(source.vae, None, source.cache_dir)("config.json") or {}
        check_base(read, self.sdxl, source.base, vae, f"{VAE_FLAG}: {source.vae}/config.json")
        trained, sampled = self.load_scheduler(source), self.load_sampler(source)
        ours, own = trained.alphas_cumprod, sampled.alphas_cumprod
        # Zero is kept as 2^-24 by some.
        if ours.shape != own.shape or not torch.allclose(ours, own, rtol=1e-4, atol=1e-6):
            raise UserError(
                f"{BASE_FLAG}: {source.base}/scheduler/scheduler_config.json: a "
                f"{type(sampled).__name__} makes another schedule of these settings than is "
                "trained on (one of them, e.g. rescale_betas_zero_snr, it does not know); give the "
                "settings that the base was trained with"
            )

    def load_unet(self, source: ModelSource) -> Any:
        """Load the UNet that a run starts from, float32: `unet_init` where given, else the base's,
        with `lora` added.

        Raises:
            UserError: not to be had, or of another family.
        """
        unet = self._plain_unet(source)
        if source.lora:
            merge_lora(unet, Path(source.lora), source.lora_flag)
        return unet

    def _plain_unet(self, source: ModelSource) -> Any:
        from diffusers import UNet2DConditionModel

        config = self.load_unet_config(source)
        init, flag = source.unet_init, source.unet_flag
        if init is None and source.weights:
            init, flag = source.weights, BASE_FLAG
        if init is None:
            return self._unet_from_pretrained(BASE_FLAG, source.base, "unet", source)
        if is_weights_file(init):
            unet = UNet2DConditionModel.from_config(config)
            where = f"{flag} {init}"
            load_strictly(unet, unet_weights(read_state_dict(Path(init)), config, where), where)
            return unet
        plain = (Path(init) / "config.json").is_file()
        subfolder = None if plain else "unet"
        unet = self._unet_from_pretrained(flag, init, subfolder, source)
        check_family(dict(unet.config), self.sdxl, f"{flag} {init}")
        check_start(dict(unet.config), config, f"{flag} {init}")
        return unet

    def _unet_from_pretrained(
        self, flag: str, name: str, subfolder: str | None, source: ModelSource
    ) -> Any:
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
        """Load VAE, text encoders, tokenizers and noise schedule, float32, without gradients.

        Raises:
            UserError: one of them is not to be had, or the model does not predict noise.
        """
        from diffusers import AutoencoderKL
        from transformers import CLIPTokenizer

        common: Any = {"revision": source.revision, "cache_dir": source.cache_dir}
        if source.vae:
            vae = from_pretrained(AutoencoderKL, VAE_FLAG, source.vae, cache_dir=source.cache_dir)
        else:
            vae = self._part(AutoencoderKL, "vae", source)
        scheduler = self.load_scheduler(source)
        encoders = [
            self._part(cls, part, source) for part, cls in self._text_encoder_classes().items()
        ]
        tokenizers = [
            from_pretrained(CLIPTokenizer, BASE_FLAG, source.base, subfolder=part, **common)
            for part in self._tokenizer_parts()
        ]
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            fit_tokenizer(tokenizer, encoder.config, f"{BASE_FLAG}: {source.base}")
        # Libraries differ in whether they load a file's dtype, and in the name of that argument.
        for module in (vae, *encoders):
            module.float().requires_grad_(False).eval()
        if source.lora:
            merge_text_lora(encoders, Path(source.lora), source.lora_flag)
        return Frozen(vae, encoders, tokenizers, scheduler)

    def _part(self, cls: Any, part: str, source: ModelSource) -> Any:
        where: Any = {"revision": source.revision, "cache_dir": source.cache_dir}
        if source.weights:
            path = Path(source.weights)
            return load_part(cls, part, path, BASE_FLAG, source.base, **where)
        return from_pretrained(cls, BASE_FLAG, source.base, subfolder=part, **where)

    def load_scheduler(self, source: ModelSource) -> Any:
        """Load the training noise schedule alone, a `DDPMScheduler`.

        Raises:
            UserError: not to be had, or the model does not predict noise.
        """
        from diffusers import DDPMScheduler

        check_schedule(_scheduler_config(source), f"{BASE_FLAG}: {source.base}")
        return from_pretrained(
            DDPMScheduler,
            BASE_FLAG,
            source.base,
            subfolder="scheduler",
            revision=source.revision,
            cache_dir=source.cache_dir,
        )

    def vae_dtype(self, vae: Any, dtype: torch.dtype) -> torch.dtype:
        """Choose the dtype to run the VAE in, given that of the run."""
        return dtype

    @abstractmethod
    def _text_encoder_classes(self) -> dict[str, Any]:
        """Subfolder to class, in the order in which their outputs are joined."""

    @abstractmethod
    def _tokenizer_parts(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers, in the same order."""

    def text_parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Name the subfolders of the text encoders, and of their tokenizers."""
        return tuple(self._text_encoder_classes()), self._tokenizer_parts()

    @abstractmethod
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the text encoders on B captions: `hidden` (B, tokens, width) and, where the
        family has it, `pooled` (B, width)."""

    @abstractmethod
    def conditions(self, text: dict[str, Tensor], sizes: Tensor) -> Conditions:
        """Make the model's conditions of `encode_text`'s output, one text for each of N images.

        Args:
            text: (N, ...).
            sizes: (N, 6), whole numbers: original height and width, the crop's top and left, height
                and width of what is left.
        """

    def encode_captions(self, frozen: Frozen, captions: list[str], resolution: int) -> Conditions:
        """Make the model's conditions of B captions, for images of `resolution` pixels square."""
        sizes = square_sizes(resolution, len(captions))
        return self.conditions(self.encode_text(frozen, captions), sizes)

    @abstractmethod
    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the model on B noised latents.

        Args:
            model: the trained model, the frozen reference, or whatever is called like them.
            x_t: (B, C, h, w).
            t: (B,), or () for all of them.
            conditions: as `conditions` gives them.

        Returns:
            Its output, (B, C, h, w), in the direction and scale of the noise process's target.
        """

    def process(self, schedule: Any) -> NoiseProcess:
        """Give the noise process of a base with this training schedule."""
        return Diffusion(schedule)

    def normalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Bring the VAE's latents to the scale that the model is trained on.

        Args:
            latents: (N, C, r, r).
            vae: the VAE's configuration, of which scaling_factor and shift_factor count.
        """
        return (latents - (vae["shift_factor"] or 0.0)) * vae["scaling_factor"]

    def denormalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Bring the model's latents, (N, C, r, r), to the VAE's scale: undo `normalise`."""
        return latents / vae["scaling_factor"] + (vae["shift_factor"] or 0)

    @abstractmethod
    def pipeline(self, unet: Any, frozen: Frozen, source: ModelSource) -> Any:
        """Build a diffusers pipeline around these very modules, with the base's own sampler."""

    @torch.no_grad()
    def encode_images(self, frozen: Frozen, pixels: Tensor, noise: Tensor) -> Tensor:
        """Encode pixels (N, 3, R, R) in [-1, 1] to normalised latents (N, C, r, r), float32.

        `noise` (N, C, r, r), standard normal, draws the sample from the VAE's posterior.
        """
        mean, std = self.encode_posterior(frozen, pixels)
        return self.sample_posterior(mean, std, noise, frozen.vae.config)

    def sample_posterior(
        self, mean: Tensor, std: Tensor, noise: Tensor, vae: Mapping[str, Any]
    ) -> Tensor:
        """Draw normalised latents (N, C, r, r), float32, from a VAE's posterior.

        Args:
            mean, std: of the posterior, (N, C, r, r) each.
            noise: standard normal, same shape.
            vae: see `normalise`.
        """
        return self.normalise(mean.float() + std.float() * noise, vae).contiguous()

    @torch.no_grad()
    def encode_posterior(self, frozen: Frozen, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels (N, 3, R, R) in [-1, 1] to mean and standard deviation of the VAE's
        posterior, each (N, C, r, r) in its dtype."""
        vae = frozen.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def latent_shape(
        self, frozen: Frozen, height: int, width: int | None = None
    ) -> tuple[int, int, int]:
        """Give (C, h, w) of the latents of an image of these pixels, by default of a square one."""
        config = frozen.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, height // factor, (width or height) // factor

    def load_sampler(self, source: ModelSource) -> Any:
        """Load the base's own sampling scheduler, of the class that its configuration names.

        Raises:
            UserError: not to be had, or of a class or settings that diffusers does not know.
        """
        import diffusers

        config = _scheduler_config(source)
        try:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        # Settings of a wrong kind raise almost anything.
        except Exception as error:
            raise UserError(
                f"{BASE_FLAG}: {source.base}/scheduler/scheduler_config.json makes no scheduler of "
                f"diffusers ({first_line(error)})"
            ) from error


def _scheduler_config(source: ModelSource) -> dict[str, Any]:
    from diffusers import DDPMScheduler

    try:
        config: dict[str, Any] = DDPMScheduler.load_config(
            source.base,
            subfolder="scheduler",
            revision=source.revision,
            cache_dir=source.cache_dir,
        )
    except Exception as error:
        raise UserError(
            f"{BASE_FLAG}: cannot load scheduler from {source.base} ({first_line(error)}); {ADVICE}"
        ) from error
    return config


def _file_reader(name: str, revision: str | None, cache_dir: str | None) -> Reader:
    """Give what reads the JSON files of a directory or of a repository on the hub."""
    if Path(name).is_dir():
        return reader(Path(name))

    def read(file: str) -> Config | None:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(name, file, revision=revision, cache_dir=cache_dir)
        # Hub and network errors come in many classes; all mean that the file is not there.
        except Exception:
            return None
        return read_config(Path(path))

    return read


def load_frozen_as(
    family: Family, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> Frozen:
    """Load the frozen parts on `device`, in a run's `dtype` (the VAE in what it can bear).

    Raises:
        UserError: one of them is not to be had.
    """
    frozen = family.load_frozen(source)
    return frozen.to(device, dtype, family.vae_dtype(frozen.vae, dtype))


def fit_tokenizer(tokenizer: Any, config: Any, where: str) -> None:
    """Limit a tokenizer, in place, to as many tokens as its text encoder takes.

    Args:
        config: of the text encoder.

    Raises:
        UserError: it has no vocabulary, or a larger one than the encoder; begins with `where`.
    """
    count = len(tokenizer)
    # Where it finds no vocabulary the library makes one of the special tokens, without a word.
    if count <= len(tokenizer.all_special_tokens):
        raise UserError(f"{where}: its tokenizer has no vocabulary (vocab.json and merges.txt)")
    if count > config.vocab_size:
        raise UserError(
            f"{where}: its tokenizer has {count} tokens, but its text encoder {config.vocab_size}"
        )
    # Files without model_max_length mean a number beyond any tensor.
    if tokenizer.model_max_length > config.max_position_embeddings:
        tokenizer.model_max_length = config.max_position_embeddings


def tokenize(tokenizer: Any, captions: list[str], device: torch.device) -> Tensor:
    """Tokenize captions, cleaned as CLIP's slow tokenizer does, to padded, truncated ids,
    (B, model_max_length)."""
    return tokenizer(
        for_tokenizer(tokenizer, captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)

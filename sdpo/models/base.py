"""What a model family answers: what to load, how captions are encoded, how its model is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.common.errors import UserError, first_line
from sdpo.config.families import FAMILIES, FamilyFacts
from sdpo.models.checks import (
    BASE_FLAG,
    VAE_FLAG,
    check_base,
    check_flow,
    check_schedule,
    check_start,
    text_parts,
)
from sdpo.models.kind import place_of_base, weights_alone
from sdpo.models.loading import (
    ADVICE,
    from_pretrained,
    is_weights_file,
    load_strictly,
    read_state_dict,
)
from sdpo.models.locations import check_family, reader_of
from sdpo.models.lora_file import merge_lora
from sdpo.models.lora_text import merge_text_lora
from sdpo.models.noise import Diffusion, NoiseProcess, RectifiedFlow, Times, base_shift
from sdpo.models.single_file import load_part, unet_weights
from sdpo.models.text import fit_tokenizer

if TYPE_CHECKING:
    from sdpo.config import TrainConfig


@dataclass
class Frozen:
    """The parts that are not trained. `text_encoders` and `tokenizers` go together."""

    vae: Any  # AutoencoderKL
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: Any  # DDPMScheduler: the training noise schedule; of a flow the base's own
    denoiser: Mapping[str, Any]  # configuration of the model that is trained

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


class Family(ABC):
    """One kind of base model. Subclasses hold what differs, as a method; `FAMILIES` what does as
    data. `times` says how a rectified flow's times are drawn."""

    name: ClassVar[str]

    def __init__(self, times: Times | None = None) -> None:
        self.times = times or Times()

    @property
    def facts(self) -> FamilyFacts:
        """The family's entry of `FAMILIES`."""
        return FAMILIES[self.name]

    @property
    def sdxl(self) -> bool:
        """Whether the family is SDXL."""
        return self.name == "sdxl"

    def model_class(self) -> Any:
        """Give the denoiser's class in diffusers."""
        return _of_diffusers(self.facts.model)

    def pipeline_class(self) -> Any:
        """Give the family's pipeline in diffusers."""
        return _of_diffusers(self.facts.pipeline)

    def load_unet_config(self, source: ModelSource) -> dict[str, Any]:
        """Read the configuration of the base's denoiser, checked to be of this family.

        Raises:
            UserError: not to be had, or of another family.
        """
        part = self.facts.part
        try:
            config: dict[str, Any] = self.model_class().load_config(
                source.base,
                subfolder=part,
                revision=source.revision,
                cache_dir=source.cache_dir,
            )
        except Exception as error:
            if source.weights:
                raise weights_alone(source.weights, source.base) from error
            raise UserError(
                f"{BASE_FLAG}: cannot load {part}/config.json of {source.base} "
                f"({first_line(error)}); {ADVICE}"
            ) from error
        check_family(config, self.name, f"{BASE_FLAG} {source.base}")
        return config

    def check(self, source: ModelSource) -> None:
        """Check by its configuration files that a base is what training, evaluation and export
        need; see `sdpo.models.checks`. No weights are read.

        Raises:
            UserError: a file is not to be had, or says that the base is another kind of model.
        """
        self.load_unet_config(source)
        vae = None
        if source.vae:
            # {} where it is not to be had: loading it says why.
            vae = reader_of(source.vae, None, source.cache_dir)("config.json") or {}
        read = reader_of(source.base, source.revision, source.cache_dir)
        check_base(read, self.name, source.base, vae, f"{VAE_FLAG}: {source.vae}/config.json")
        if self.facts.flow:
            self.load_sampler(source)
            return
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
        """Load the denoiser that a run starts from, float32: `unet_init` where given, else the
        base's, with `lora` added.

        Raises:
            UserError: not to be had, or of another family.
        """
        unet = self._plain_unet(source)
        if source.lora:
            merge_lora(unet, Path(source.lora), source.lora_flag)
        return unet

    def _plain_unet(self, source: ModelSource) -> Any:
        config = self.load_unet_config(source)
        init, flag, part = source.unet_init, source.unet_flag, self.facts.part
        if init is None and source.weights:
            init, flag = source.weights, BASE_FLAG
        if init is None:
            return self._unet_from_pretrained(BASE_FLAG, source.base, part, source)
        if is_weights_file(init):
            unet = self.model_class().from_config(config)
            where = f"{flag} {init}"
            self._load_file(unet, Path(init), config, source, where)
            return unet
        plain = (Path(init) / "config.json").is_file()
        unet = self._unet_from_pretrained(flag, init, None if plain else part, source)
        check_family(dict(unet.config), self.name, f"{flag} {init}")
        check_start(dict(unet.config), config, self.facts, f"{flag} {init}")
        return unet

    def _load_file(
        self, unet: Any, path: Path, config: dict[str, Any], source: ModelSource, where: str
    ) -> None:
        state = read_state_dict(path)
        if self.facts.part == "unet":
            if "v_pred" in state and self._predicts(source) != "v_prediction":
                raise UserError(
                    f"{where} predicts v (it holds v_pred), but the scheduler of {source.base} is "
                    "of noise prediction; give --single_file_config or a base that predicts v"
                )
            state = unet_weights(state, config, where)
        load_strictly(unet, state, where)

    def _predicts(self, source: ModelSource) -> Any:
        return _scheduler_config(source).get("prediction_type", "epsilon")

    def _unet_from_pretrained(
        self, flag: str, name: str, subfolder: str | None, source: ModelSource
    ) -> Any:
        return from_pretrained(
            self.model_class(),
            flag,
            name,
            subfolder=subfolder,
            revision=source.revision if flag == BASE_FLAG else None,
            cache_dir=source.cache_dir,
        ).float()

    def load_frozen(self, source: ModelSource) -> Frozen:
        """Load VAE, text encoders, tokenizers and noise schedule, float32, without gradients.

        Raises:
            UserError: one of them is not to be had, or the schedule is of another kind.
        """
        import transformers

        common: Any = {"revision": source.revision, "cache_dir": source.cache_dir}
        vae_class = _of_diffusers(self.facts.vae_model)
        if source.vae:
            vae = from_pretrained(vae_class, VAE_FLAG, source.vae, cache_dir=source.cache_dir)
        else:
            vae = self._part(vae_class, "vae", source)
        scheduler = self.load_scheduler(source)
        encoders, tokenizers, advice = [], [], ADVICE
        if find_spec("sentencepiece") is None:
            advice += "; a tokenizer of spiece.model alone needs pip install sentencepiece"
        for folder in self.text_folders(source):
            part = self.facts.text[folder]
            encoder = self._part(getattr(transformers, part.encoder), folder, source)
            tokenizer_class = getattr(transformers, part.tokenizer_class)
            tokenizer = from_pretrained(
                tokenizer_class, BASE_FLAG, source.base, advice, subfolder=part.tokenizer, **common
            )
            fit_tokenizer(tokenizer, encoder.config, f"{BASE_FLAG}: {source.base}")
            encoders.append(encoder)
            tokenizers.append(tokenizer)
        # Libraries differ in whether they load a file's dtype, and in the name of that argument.
        for module in (vae, *encoders):
            module.float().requires_grad_(False).eval()
        if source.lora:
            merge_text_lora(encoders, Path(source.lora), source.lora_flag)
        return Frozen(vae, encoders, tokenizers, scheduler, self.load_unet_config(source))

    def _part(self, cls: Any, part: str, source: ModelSource) -> Any:
        where: Any = {"revision": source.revision, "cache_dir": source.cache_dir}
        if source.weights:
            path = Path(source.weights)
            return load_part(cls, part, path, BASE_FLAG, source.base, **where)
        return from_pretrained(cls, BASE_FLAG, source.base, subfolder=part, **where)

    def load_scheduler(self, source: ModelSource) -> Any:
        """Load the training noise schedule alone, a `DDPMScheduler`; of a rectified flow the base's
        own scheduler.

        Raises:
            UserError: not to be had, or of a kind that the family does not have.
        """
        from diffusers import DDPMScheduler

        if self.facts.flow:
            check_flow(_scheduler_config(source), f"{BASE_FLAG}: {source.base}")
            return self.load_sampler(source)
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
        """Choose the dtype to run the VAE in, given that of the run: float32 for one that overflows
        in float16, as SDXL's own does."""
        overflows = self.facts.upcast and dtype == torch.float16 and vae.config.force_upcast
        return torch.float32 if overflows else dtype

    def text_folders(self, source: ModelSource) -> list[str]:
        """Name the folders of the base's text encoders, in the order of `Frozen.text_encoders`."""
        read = reader_of(source.base, source.revision, source.cache_dir)
        return text_parts(self.name, read("model_index.json") or {})

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

    def process(self, schedule: Any, latent_shape: Sequence[int]) -> NoiseProcess:
        """Give the noise process of a base with this training schedule, for latents of a shape
        (C, r, r)."""
        if not self.facts.flow:
            return Diffusion(schedule)
        if self.times.shift is not None:
            return RectifiedFlow(self.times.shift, self.times)
        return RectifiedFlow(base_shift(schedule.config, self.tokens(latent_shape)), self.times)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Count the image tokens of latents (C, h, w)."""
        return latent_shape[1] * latent_shape[2] // self.facts.patch**2

    def normalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Bring the VAE's latents to the scale that the model is trained on.

        Args:
            latents: (N, C, r, r).
            vae: the VAE's configuration, or what `normalising` chose of it.
        """
        return (latents - (vae.get("shift_factor") or 0.0)) * vae["scaling_factor"]

    def normalising(self, vae: Mapping[str, Any]) -> dict[str, Any]:
        """Choose of a VAE's configuration what `normalise` needs."""
        return {name: vae.get(name) for name in ("scaling_factor", "shift_factor")}

    def denormalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Bring the model's latents, (N, C, r, r), to the VAE's scale: undo `normalise`."""
        return latents / vae["scaling_factor"] + (vae.get("shift_factor") or 0)

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give the arguments by which the base's pipeline is told prompts and guidance."""
        return {
            "prompt": for_tokenizer(pipeline.tokenizer, prompts),
            "guidance_scale": guidance,
        }

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
        levels = config.get("encoder_block_out_channels") or config["block_out_channels"]
        factor = 2 ** (len(levels) - 1)
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


def _of_diffusers(name: str) -> Any:
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise UserError(
            f"{BASE_FLAG}: this diffusers ({diffusers.__version__}) has no {name}: "
            "pip install -U diffusers"
        ) from None


def config_of(model: Any) -> Mapping[str, Any]:
    """Give the configuration of a denoiser, whatever it is wrapped in."""
    while not hasattr(model, "config"):
        model = getattr(model, "module", None) or model.unet
    config: Mapping[str, Any] = model.config
    return config


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


def load_frozen_as(
    family: Family, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> Frozen:
    """Load the frozen parts on `device`, in a run's `dtype` (the VAE in what it can bear).

    Raises:
        UserError: one of them is not to be had.
    """
    frozen = family.load_frozen(source)
    return frozen.to(device, dtype, family.vae_dtype(frozen.vae, dtype))

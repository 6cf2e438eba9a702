"""The model families by name, as data, and how a base's configuration tells its family; no torch.

A family is one entry here and one file in sdpo/models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# Projections of attention, by the end of their names.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Those of the text side of a joint attention.
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class TextPart(NamedTuple):
    """A text encoder: its class, and its tokenizer's folder and class, of transformers."""

    encoder: str
    tokenizer: str
    tokenizer_class: str
    optional: bool = False  # bases without it are served


@dataclass(frozen=True)
class FamilyFacts:
    """What of a family can be said without its code."""

    label: str
    base: str  # what evaluation takes where no base is given
    resolution: int  # pixels, where neither --resolution nor the base says
    guidance: float  # diffusers' scale, of sample grids and evaluation
    text: Mapping[str, TextPart]  # by folder, in the order in which outputs are joined
    vae: str | None = None  # what evaluation takes with that base; None: its own
    part: str = "unet"  # folder of the denoiser
    model: str = "UNet2DConditionModel"  # its class in diffusers
    vae_model: str = "AutoencoderKL"
    pipeline: str = ""  # class in diffusers; also the one that model_index.json must name
    aliases: tuple[str, ...] = ()  # other names of model and pipeline, in files of older diffusers
    untold: tuple[str, ...] = ()  # settings of models that must be told more than time and caption
    upcast: bool = False  # a VAE with force_upcast overflows in float16
    multiple: int = 8  # sides of images are multiples of it
    units: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")  # whole at a time in FSDP
    lora_targets: tuple[str, ...] = _ATTENTION  # none: diffusers reads no LoRA of it
    packed: bool = False  # 2 x 2 latents are one token's channels
    patch: int = 2  # latents to a side of a token
    flow: bool = False  # rectified flow; else a discrete schedule of betas
    since: tuple[int, int] | None = None  # diffusers before it computes something else
    idle_weights: bool = False  # some get no gradient, as the last block's of the captions
    advice: str = ""  # how to say so by flags
    steps: int = 50  # of a sampler

    @property
    def kind(self) -> str:
        """What people call its denoiser."""
        return "UNet" if self.part == "unet" else "transformer"


_CLIP = TextPart("CLIPTextModel", "tokenizer", "CLIPTokenizer")
_CLIP_PROJECTED = _CLIP._replace(encoder="CLIPTextModelWithProjection")

_T5 = TextPart("T5EncoderModel", "tokenizer", "AutoTokenizer")
_GEMMA = _T5._replace(encoder="Gemma2Model")


def _second(part: TextPart, number: int) -> TextPart:
    return part._replace(tokenizer=f"tokenizer_{number}")


FAMILIES: dict[str, FamilyFacts] = {
    "sd15": FamilyFacts(
        label="SD1.5",
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        resolution=512,
        guidance=7.5,
        text={"text_encoder": _CLIP},
        pipeline="StableDiffusionPipeline",
        advice="leave --sdxl out",
    ),
    "sdxl": FamilyFacts(
        label="SDXL",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        vae="madebyollin/sdxl-vae-fp16-fix",
        resolution=1024,
        guidance=5.0,
        text={"text_encoder": _CLIP, "text_encoder_2": _second(_CLIP_PROJECTED, 2)},
        pipeline="StableDiffusionXLPipeline",
        upcast=True,
        advice="add --sdxl",
    ),
    "sd3": FamilyFacts(
        label="SD3",
        base="stabilityai/stable-diffusion-3.5-medium",
        resolution=1024,
        guidance=4.5,
        text={
            "text_encoder": _CLIP_PROJECTED,
            "text_encoder_2": _second(_CLIP_PROJECTED, 2),
            "text_encoder_3": _T5._replace(tokenizer="tokenizer_3", optional=True),
        },
        part="transformer",
        model="SD3Transformer2DModel",
        pipeline="StableDiffusion3Pipeline",
        multiple=16,
        units=("JointTransformerBlock",),
        lora_targets=_JOINT,
        flow=True,
        steps=40,
    ),
    "flux": FamilyFacts(
        label="FLUX.1",
        base="black-forest-labs/FLUX.1-dev",
        resolution=1024,
        guidance=3.5,
        text={"text_encoder": _CLIP, "text_encoder_2": _second(_T5, 2)},
        part="transformer",
        model="FluxTransformer2DModel",
        pipeline="FluxPipeline",
        multiple=16,
        units=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        lora_targets=(
            *_JOINT,
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        packed=True,
        flow=True,
    ),
    "qwen-image": FamilyFacts(
        label="Qwen-Image",
        base="Qwen/Qwen-Image",
        resolution=1024,
        guidance=4.0,
        text={
            "text_encoder": TextPart(
                "Qwen2_5_VLForConditionalGeneration", "tokenizer", "AutoTokenizer"
            )
        },
        part="transformer",
        model="QwenImageTransformer2DModel",
        vae_model="AutoencoderKLQwenImage",
        pipeline="QwenImagePipeline",
        multiple=16,
        units=("QwenImageTransformerBlock",),
        lora_targets=_JOINT,
        since=(0, 37),  # attends to the padding of captions before
        idle_weights=True,
        packed=True,
        flow=True,
    ),
    "z-image": FamilyFacts(
        label="Z-Image",
        base="Tongyi-MAI/Z-Image",
        resolution=1024,
        guidance=4.0,
        text={"text_encoder": TextPart("Qwen3Model", "tokenizer", "AutoTokenizer")},
        part="transformer",
        model="ZImageTransformer2DModel",
        pipeline="ZImagePipeline",
        multiple=16,
        units=("ZImageTransformerBlock",),
        flow=True,
    ),
    "pixart-sigma": FamilyFacts(
        label="PixArt-Sigma",
        base="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        resolution=1024,
        guidance=4.5,
        text={"text_encoder": _T5},
        part="transformer",
        model="PixArtTransformer2DModel",
        pipeline="PixArtSigmaPipeline",
        aliases=("Transformer2DModel",),
        untold=("use_additional_conditions",),
        upcast=True,
        multiple=16,
        units=("BasicTransformerBlock",),
        lora_targets=(),
        steps=20,
    ),
    "sana": FamilyFacts(
        label="Sana",
        base="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        resolution=1024,
        guidance=4.5,
        text={"text_encoder": _GEMMA},
        part="transformer",
        model="SanaTransformer2DModel",
        vae_model="AutoencoderDC",
        pipeline="SanaPipeline",
        untold=("guidance_embeds",),
        multiple=32,
        units=("SanaTransformerBlock",),
        patch=1,
        flow=True,
        steps=20,
    ),
    "lumina-2": FamilyFacts(
        label="Lumina-Image 2.0",
        base="Alpha-VLLM/Lumina-Image-2.0",
        resolution=1024,
        guidance=4.0,
        text={"text_encoder": _GEMMA},
        part="transformer",
        model="Lumina2Transformer2DModel",
        pipeline="Lumina2Pipeline",
        aliases=("Lumina2Text2ImgPipeline",),
        multiple=16,
        units=("Lumina2TransformerBlock",),
        flow=True,
        steps=30,
    ),
    "flux2-klein": FamilyFacts(
        label="FLUX.2 klein",
        base="black-forest-labs/FLUX.2-klein-base-4B",
        resolution=1024,
        guidance=4.0,
        text={"text_encoder": TextPart("Qwen3ForCausalLM", "tokenizer", "AutoTokenizer")},
        part="transformer",
        model="Flux2Transformer2DModel",
        vae_model="AutoencoderKLFlux2",
        pipeline="Flux2KleinPipeline",
        untold=("guidance_embeds",),
        multiple=16,
        units=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        lora_targets=(
            *_JOINT,
            "ff.linear_in",
            "ff.linear_out",
            "ff_context.linear_in",
            "ff_context.linear_out",
            "to_qkv_mlp_proj",
        ),
        packed=True,
        patch=1,
        flow=True,
    ),
}
PARTS = tuple(dict.fromkeys(facts.part for facts in FAMILIES.values()))


def family_of_config(config: Mapping[str, Any]) -> str | None:
    """Name the family of a denoiser's configuration; None: there is none. A UNet that is
    conditioned on pooled text and sizes is SDXL's, any other SD1.5's."""
    model = config.get("_class_name", "UNet2DConditionModel")
    if model == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
    return next(
        (name for name, facts in FAMILIES.items() if model in (facts.model, *facts.aliases)), None
    )

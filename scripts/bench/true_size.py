"""The bases at their true size, as configurations: counted on the meta device, or written with
random weights for benchmarks without a hub.

    python -m scripts.bench.true_size {sd15,sdxl} DIR

writes a pipeline in diffusers layout and half precision, 2.2 or 7 GB on disk.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.common import ROOT
from sdpo.common.errors import run_main
from sdpo.config.families import FAMILIES

if TYPE_CHECKING:
    import torch

    from sdpo.models.base import Frozen


@dataclass(frozen=True)
class TextEncoder:
    """A class of transformers, its configuration where it is not the class's default, and its
    number of parameters."""

    name: str
    parameters: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class TrueBase:
    """A published base: its family, its denoiser's number of parameters and configuration where
    it is not diffusers' default, its text encoders, and how many tokens and channels the denoiser
    is given."""

    label: str
    family: str
    parameters: int
    text: tuple[TextEncoder, ...]
    denoiser: Mapping[str, Any]
    tokens: int = 77
    channels: int = 16  # of the latents
    vae_parameters: int = 83_819_683  # of SD3's and FLUX.1's VAE
    resolution: int = 1024  # pixels, at which it is trained


_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
CLIP = TextEncoder("CLIPTextModel", 123_060_480, {**_CLIP, "num_attention_heads": 12})
CLIP_PROJECTED = TextEncoder("CLIPTextModelWithProjection", 123_650_304, CLIP.config)
BIG_G = TextEncoder("CLIPTextModelWithProjection", 694_659_840, _BIG_G)
T5_XXL = TextEncoder(
    "T5EncoderModel",
    4_762_310_656,
    {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
)
QWEN_25_VL = TextEncoder(
    "Qwen2_5_VLForConditionalGeneration",
    8_292_166_656,
    {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420},
    },
)
QWEN_3_4B = TextEncoder(
    "Qwen3Model",
    4_022_468_096,
    {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
)
_SD_VAE = {"channels": 4, "vae_parameters": 83_653_863}
_SD3_TEXT = (CLIP_PROJECTED, BIG_G, T5_XXL)
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}

BASES = {
    "sd15": TrueBase(
        "SD1.5",
        "sd15",
        859_520_964,
        (CLIP,),
        {"sample_size": 64, "cross_attention_dim": 768},
        resolution=512,
        **_SD_VAE,
    ),
    "sdxl": TrueBase(
        "SDXL",
        "sdxl",
        2_567_463_684,
        (CLIP, BIG_G),
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        **_SD_VAE,
    ),
    "pixart-sigma": TrueBase(
        "PixArt-Sigma",
        "pixart-sigma",
        610_856_096,
        (T5_XXL,),
        {
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        tokens=300,
        **_SD_VAE,
    ),
    "sd3": TrueBase("SD3 medium", "sd3", 2_028_328_000, _SD3_TEXT, _SD3, 77 + 256),
    "sd35-medium": TrueBase(
        "SD3.5 medium",
        "sd3",
        2_243_171_520,
        _SD3_TEXT,
        {
            **_SD3,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        77 + 256,
    ),
    "sd35-large": TrueBase(
        "SD3.5 large",
        "sd3",
        8_056_627_520,
        _SD3_TEXT,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        77 + 256,
    ),
    "flux": TrueBase(
        "FLUX.1-dev", "flux", 11_901_408_320, (CLIP, T5_XXL), {"guidance_embeds": True}, 512
    ),
    "qwen-image": TrueBase(
        "Qwen-Image",
        "qwen-image",
        20_430_401_088,
        (QWEN_25_VL,),
        {},
        512,
        vae_parameters=126_892_531,
    ),
    "z-image": TrueBase("Z-Image", "z-image", 6_154_908_736, (QWEN_3_4B,), {}, 512),
}
# Those that `write_pipeline` writes.
WRITTEN = ("sd15", "sdxl")


def build_denoiser(name: str) -> Any:
    """Build a base's denoiser, on the default device."""
    import diffusers

    base = BASES[name]
    return getattr(diffusers, FAMILIES[base.family].model)(**base.denoiser)


def build_text_encoders(name: str) -> list[Any]:
    """Build a base's text encoders, on the default device."""
    import transformers

    encoders = []
    for encoder in BASES[name].text:
        kind = getattr(transformers, encoder.name)
        encoders.append(kind(kind.config_class(**encoder.config)))
    return encoders


def build_vae(name: str) -> Any:
    """Build a base's VAE, on the default device."""
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    base = BASES[name]
    if FAMILIES[base.family].vae_model == "AutoencoderKLQwenImage":
        return AutoencoderKLQwenImage()
    quant = base.channels == 4
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=base.channels,
        scaling_factor=0.18215,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


def build_frozen(name: str) -> Frozen:
    """Build SD1.5's or SDXL's VAE, text encoders and noise schedule, on the default device; no
    tokenizers."""
    from diffusers import DDPMScheduler

    from sdpo.models.base import Frozen

    vae, encoders = build_vae(name), build_text_encoders(name)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    for module in (vae, *encoders):
        module.requires_grad_(False).eval()
    return Frozen(vae, encoders, [], scheduler, BASES[name].denoiser)


def call_on_meta(
    name: str, denoiser: Any, resolution: int, samples: int, dtype: torch.dtype
) -> torch.Tensor:
    """Call a denoiser that is on the meta device on `samples` noised images of `resolution` pixels,
    with captions of as many tokens as the family ever gives it."""
    import torch

    from sdpo.models import get_family

    base = BASES[name]
    config, side = denoiser.config, resolution // 8
    widths = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim")
    width = config.get("caption_channels") or next(config[w] for w in widths if config.get(w))
    # Z-Image takes captions apart by their masks, which must have values.
    mask = torch.ones(samples, base.tokens, device="cpu" if name == "z-image" else "meta")
    with torch.device("meta"):
        conditions = {"hidden": torch.empty(samples, base.tokens, width, dtype=dtype)}
        if base.family == "sdxl":
            conditions["text_embeds"] = torch.empty(samples, 1280, dtype=dtype)
            conditions["time_ids"] = torch.empty(samples, 6, dtype=dtype)
        if config.get("pooled_projection_dim"):
            pooled = torch.empty(samples, config.pooled_projection_dim, dtype=dtype)
            conditions["pooled"] = pooled
        conditions["mask"] = mask
        noisy = torch.empty(samples, base.channels, side, side, dtype=dtype)
        flow = FAMILIES[base.family].flow
        times = torch.zeros(samples, dtype=dtype if flow else torch.long)
        return get_family(base.family).predict(denoiser, noisy, times, conditions)


def write_pipeline(family: str, path: Path) -> None:
    """Build a pipeline, cast it to half precision and save it in diffusers layout.

    Its tokenizers are the tiny world's, padded to 77 tokens: their ids are valid in the true
    vocabulary.
    """
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from sdpo.tinyworld.architecture import build_tokenizer

    torch.manual_seed(0)
    frozen, tokenizer = build_frozen(family), build_tokenizer()
    tokenizer.model_max_length = BASES[family].tokens
    encoders = [encoder.half() for encoder in frozen.text_encoders]
    parts: dict[str, Any] = {
        "vae": frozen.vae.half(),
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "unet": build_denoiser(family).half(),
        "scheduler": frozen.scheduler,
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizer}
        pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(path)


def writing(family: str, path: Path) -> list[str]:
    """Give the command, to be run from ROOT, of a process that writes a pipeline: its memory is
    given back."""
    print(f"writing a random {family} pipeline", flush=True)
    return [sys.executable, "-m", "scripts.bench.true_size", family, str(path)]


def write_pipeline_apart(family: str, path: Path) -> None:
    """Write a pipeline by a process of its own."""
    subprocess.run(writing(family, path), check=True, cwd=ROOT)


def main() -> int:
    """Write the pipeline that the command line names."""
    import torch

    from sdpo.common.processes import quieten_libraries

    family, path = sys.argv[1:]
    quieten_libraries()
    # An accelerator draws random weights in a second.
    there = torch.accelerator.is_available()
    with (there and torch.accelerator.current_accelerator()) or torch.device("cpu"):
        write_pipeline(family, Path(path))
    return 0


if __name__ == "__main__":
    run_main(main, "true_size")

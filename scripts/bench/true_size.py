"""SD1.5 and SDXL at their true size, with random weights: for benchmarks without a hub.

    python -m scripts.bench.true_size {sd15,sdxl} DIR

writes a pipeline in diffusers layout and half precision, 2.2 or 7 GB on disk.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.common import ROOT
from sdpo.common.errors import run_main

if TYPE_CHECKING:
    import torch

    from sdpo.models.base import Frozen

UNETS: dict[str, dict[str, Any]] = {
    # The rest of SD1.5 is diffusers' default.
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
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
}
# Of the published UNets.
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
RESOLUTION = {"sd15": 512, "sdxl": 1024}
TOKENS = 77
# The CLIP text towers: SD1.5's, which is SDXL's first, and SDXL's second, OpenCLIP's bigG.
_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_SECOND_TEXT: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def build_unet(family: str) -> Any:
    """Build the family's UNet, on the default device."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNETS[family])


def build_frozen(family: str) -> Frozen:
    """Build the family's VAE, text encoders and noise schedule, on the default device; no
    tokenizers."""
    from diffusers import AutoencoderKL, DDPMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from sdpo.models.base import Frozen

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.18215,
    )
    encoders: list[Any] = [CLIPTextModel(CLIPTextConfig(**_TEXT))]
    if family == "sdxl":
        encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**_SECOND_TEXT)))
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    for module in (vae, *encoders):
        module.requires_grad_(False).eval()
    return Frozen(vae, encoders, [], scheduler, UNETS[family])


def call_on_meta(
    family: str, unet: Any, resolution: int, samples: int, dtype: torch.dtype
) -> torch.Tensor:
    """Call a UNet that is on the meta device on `samples` noised images of `resolution` pixels."""
    import torch

    from sdpo.models import get_family

    with torch.device("meta"):
        side, width = resolution // 8, unet.config.cross_attention_dim
        conditions = {"hidden": torch.empty(samples, TOKENS, width, dtype=dtype)}
        if family == "sdxl":
            conditions["text_embeds"] = torch.empty(samples, 1280, dtype=dtype)
            conditions["time_ids"] = torch.empty(samples, 6, dtype=dtype)
        noisy = torch.empty(samples, 4, side, side, dtype=dtype)
        times = torch.zeros(samples, dtype=torch.long)
        return get_family(family).predict(unet, noisy, times, conditions)


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
    tokenizer.model_max_length = TOKENS
    encoders = [encoder.half() for encoder in frozen.text_encoders]
    parts: dict[str, Any] = {
        "vae": frozen.vae.half(),
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "unet": build_unet(family).half(),
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


def write_pipeline_apart(family: str, path: Path) -> None:
    """Write a pipeline by a process of its own, so that its memory is given back."""
    print(f"writing a random {family} pipeline", flush=True)
    program = [sys.executable, "-m", "scripts.bench.true_size", family, str(path)]
    subprocess.run(program, check=True, cwd=ROOT)


def main() -> int:
    """Write the pipeline that the command line names."""
    from sdpo.common.processes import quieten_libraries

    family, path = sys.argv[1:]
    quieten_libraries()
    write_pipeline(family, Path(path))
    return 0


if __name__ == "__main__":
    run_main(main, "true_size")

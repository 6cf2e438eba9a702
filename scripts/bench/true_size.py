"""The real architectures of SD1.5 and SDXL, with random weights: for benchmarks without a hub."""

from __future__ import annotations

from typing import Any

from torch import nn

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


def build_unet(family: str) -> nn.Module:
    """The family's UNet at its true size, on the default device."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNETS[family])


def count_on_meta(family: str) -> int:
    """The number of the UNet's parameters, without memory for them."""
    import torch

    with torch.device("meta"):
        unet = build_unet(family)
    return sum(p.numel() for p in unet.parameters())


def build_sd15_frozen(with_tokenizer: bool = True) -> Any:
    """SD1.5's VAE, text encoder and noise schedule, random weights; the tiny world's tokenizer
    padded to 77 tokens (its ids are valid in the real vocabulary), or none."""
    from diffusers import AutoencoderKL, DDPMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdpo.models.base import Frozen
    from sdpo.tinyworld.architecture import build_tokenizer

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        )
    )
    tokenizers = []
    if with_tokenizer:
        tokenizers.append(build_tokenizer())
        tokenizers[0].model_max_length = 77
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    for module in (vae, text):
        module.requires_grad_(False).eval()
    return Frozen(vae, [text], tokenizers, scheduler)

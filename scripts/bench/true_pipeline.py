"""Write a random pipeline of SD1.5's or SDXL's true size, in diffusers layout and half precision.

    python scripts/bench/true_pipeline.py {sd15,sdxl} DIR

2.2 or 7 GB on disk. step.py calls it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdpo.common.errors import run_main

PROMPT_LENGTH = 77
# OpenCLIP's bigG text tower, SDXL's second encoder.
SECOND_ENCODER = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def build_second_encoder() -> Any:
    """SDXL's second text encoder, on the default device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**SECOND_ENCODER))


def write_pipeline(family: str, path: Path) -> None:
    """Build, cast and save."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from scripts.bench.true_size import build_sd15_frozen, build_unet
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    torch.manual_seed(0)
    frozen = build_sd15_frozen()
    tokenizer, encoder = frozen.tokenizers[0], frozen.text_encoders[0]
    parts: dict[str, Any] = {
        "vae": frozen.vae.half(),
        "text_encoder": encoder.half(),
        "tokenizer": tokenizer,
        "unet": build_unet(family).half(),
        "scheduler": frozen.scheduler,
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": build_second_encoder().half(), "tokenizer_2": tokenizer}
        pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(path)


def main() -> int:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("sd15", "sdxl"))
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    write_pipeline(args.family, args.path)
    return 0


if __name__ == "__main__":
    run_main(main, "true_pipeline.py")

"""The model families by name: defaults, and how a UNet's config tells its family; no torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Flag(NamedTuple):
    label: str
    advice: str
    resolution: int  # pixels, where --resolution is not given
    base: str  # what evaluation takes where no base is given, and its VAE
    vae: str | None


FAMILIES = {
    "sd15": _Flag(
        "SD1.5", "leave --sdxl out", 512, "stable-diffusion-v1-5/stable-diffusion-v1-5", None
    ),
    "sdxl": _Flag(
        "SDXL",
        "add --sdxl",
        1024,
        "stabilityai/stable-diffusion-xl-base-1.0",
        "madebyollin/sdxl-vae-fp16-fix",
    ),
}


def family_of_config(unet_config: dict[str, Any]) -> str:
    """ "sdxl" for a UNet conditioned on pooled text and time ids, else "sd15"."""
    return "sdxl" if unet_config.get("addition_embed_type") == "text_time" else "sd15"

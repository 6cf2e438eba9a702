"""Telling a model's family from its UNet config, without torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Flag(NamedTuple):
    label: str
    advice: str
    resolution: int  # pixels, where --resolution is not given


FAMILY_FLAGS = {
    "sd15": _Flag("SD1.5", "leave --sdxl out", 512),
    "sdxl": _Flag("SDXL", "add --sdxl", 1024),
}


def family_of_config(unet_config: dict[str, Any]) -> str:
    """ "sdxl" for a UNet conditioned on pooled text and time ids, else "sd15"."""
    return "sdxl" if unet_config.get("addition_embed_type") == "text_time" else "sd15"

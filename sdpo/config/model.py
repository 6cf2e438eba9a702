"""Which base is trained, which of its weights, and what they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdpo.common.flags import ABOVE_ZERO, BELOW_ONE, at_least, flag

REFERENCE_FLAG = "--cache_reference"


@dataclass(frozen=True)
class ModelConfig:
    """The base pipeline; adapters, averages and the reference."""

    pretrained_model_name_or_path: str = flag(
        "",
        "base pipeline: a hub id, a local directory in diffusers layout, or a single-file "
        "checkpoint in the original layout",
        metavar="ID_OR_PATH",
        required=True,
        expand=True,
    )
    single_file_config: str | None = flag(
        None,
        "base whose configurations and tokenizers a single-file checkpoint goes with",
        metavar="ID_OR_DIR",
        shown="the family's official one",
        expand=True,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        'VAE instead of the base\'s own, e.g. madebyollin/sdxl-vae-fp16-fix; "" takes back a '
        "recipe's",
        metavar="ID_OR_DIR",
        expand=True,
        empty=True,
    )
    revision: str | None = flag(None, "git revision of the base on the hub")
    unet_init: str | None = flag(
        None,
        "start UNet and reference from these weights instead of the base's: unet.pth, "
        ".safetensors, or a diffusers UNet or pipeline (directory or hub id)",
        metavar="PATH",
        expand=True,
    )
    sdxl: bool = flag(
        False, "check that the base is an SDXL model; the family is read from the base itself"
    )
    lora_rank: int | None = flag(
        None,
        "train adapters of rank N instead of the UNet; the reference is then the same UNet without "
        "them, so that only one is in memory",
        metavar="N",
        check=at_least(1),
    )
    lora_alpha: float | None = flag(
        None,
        "adapters count times A / rank; programs that do not read diffusers' metadata take it for "
        "the rank",
        metavar="A",
        check=ABOVE_ZERO,
        shown="the rank",
    )
    lora_init: str | None = flag(
        None,
        "start the adapters, and the reference, from a LoRA file (diffusers' or kohya's names) of "
        "the same layers; rank and alpha are given as its largest layer has them",
        metavar="FILE",
        expand=True,
    )
    lora_dropout: float = flag(
        0.0, "share of an adapter's inputs that is left out", metavar="P", check=BELOW_ONE
    )
    use_dora: bool = flag(
        False, "DoRA: adapters for the direction of the weights, their length trained beside it"
    )
    lora_target_modules: tuple[str, ...] | None = flag(
        None,
        "linear layers and convolutions to adapt, by the end of their names in the UNet",
        metavar="NAME",
        shown="the attention's projections",
    )
    quantize_base: Literal["8bit", "4bit"] | None = flag(
        None,
        "keep the linear layers of the base, which is the reference too, in 8 bits (int8) or 4 "
        "(NF4); needs bitsandbytes",
        choices=("8bit", "4bit"),
    )
    use_ema: bool = flag(
        False,
        "keep a moving average of the trained weights too, float32 on the device, saved as "
        "unet_ema.pth and pipeline_ema/",
    )
    ema_decay: float = flag(0.9999, "decay of that average", metavar="D", check=BELOW_ONE)
    offload_reference: bool = flag(
        False, "keep the reference in the host's memory, on the device only while it is asked"
    )
    cache_reference: str | None = flag(
        None,
        "keep the reference's errors of every pair trained on in DIR; runs that find all of theirs "
        "there hold no reference",
        metavar="DIR",
        expand=True,
    )
    offload_text_encoders: bool = flag(
        False,
        "keep the text encoders in the host's memory, on the device only while captions are "
        "encoded",
    )

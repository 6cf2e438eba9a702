"""How a model is used, for its card: Python that does it with diffusers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo.config import ModelConfig
from sdpo.config.families import FAMILIES
from sdpo.models.locations import WEIGHT_SUFFIXES, hub_id

PROMPT = "a red bicycle in front of a white wall"


@dataclass(frozen=True)
class Weights:
    """One way in which a card's weights lie beside it.

    `kind` is pipeline (a directory in diffusers layout), single_file (in the original layout), lora
    or unet (a state dict); `name` is the path from the card, "" where they are what the card's own
    directory holds; `ema` that of the moving averages, where there are."""

    kind: str
    name: str
    ema: str = ""


def code(
    weights: Weights,
    model: ModelConfig,
    family: str,
    resolution: int,
    repo: str | None,
    absent: Sequence[str] = (),
) -> str:
    """Write the program that makes an image.

    Args:
        model: of the run.
        family: of its base.
        resolution: pixels.
        repo: hub id that the card lies in; None for a directory, in which the program is then run.
        absent: parts that the base has not.
    """
    load = {"pipeline": _pipeline, "single_file": _file, "lora": _lora, "unet": _unet}
    lines = load[weights.kind](weights.name, model, repo)
    if absent:
        more = "".join(f", {name}=None" for name in absent)
        lines = [
            f"{line[:-1]}{more})" if "DiffusionPipeline.from_pretrained(" in line else line
            for line in lines
        ]
    lines = [line.replace("pipeline.unet.", f"pipeline.{FAMILIES[family].part}.") for line in lines]
    prompt = f'image = pipeline("{PROMPT}", height={resolution}, width={resolution}).images[0]'
    return "\n".join([*lines, prompt, 'image.save("image.png")'])


def _pipeline(name: str, model: ModelConfig, repo: str | None) -> list[str]:
    place = repo or (f"./{name}" if name else ".")
    return [
        "from diffusers import DiffusionPipeline\n",
        f"pipeline = DiffusionPipeline.from_pretrained({_text(place)})",
    ]


def _file(name: str, model: ModelConfig, repo: str | None) -> list[str]:
    place = f"https://huggingface.co/{repo}/blob/main/{name}" if repo else f"./{name}"
    config = model.single_file_config or model.pretrained_model_name_or_path
    if Path(config).suffix in WEIGHT_SUFFIXES:
        return _from_file(place, model, None)
    return _from_file(place, model, place_of(config, repo))


def _from_file(place: str, model: ModelConfig, config: str | None) -> list[str]:
    cls = "StableDiffusionXLPipeline" if model.sdxl else "StableDiffusionPipeline"
    more = f", config={_text(config)}" if config else ""
    return [
        f"from diffusers import {cls}\n",
        f"pipeline = {cls}.from_single_file({_text(place)}{more})",
    ]


def _lora(name: str, model: ModelConfig, repo: str | None) -> list[str]:
    adapters = f'pipeline.load_lora_weights("{repo or "."}", weight_name={_text(name)})'
    return [*_base(model, repo), adapters]


def _unet(name: str, model: ModelConfig, repo: str | None) -> list[str]:
    lines = _base(model, repo)
    read = f"pipeline.unet.load_state_dict(torch.load({_text(f'./{name}')}, weights_only=True))"
    return ["import torch", *lines, read]


def _base(model: ModelConfig, repo: str | None) -> list[str]:
    base, vae = model.pretrained_model_name_or_path, model.pretrained_vae_model_name_or_path
    place = place_of(base, repo)
    if Path(base).suffix in WEIGHT_SUFFIXES:
        config = model.single_file_config
        return _from_file(place, model, place_of(config, repo) if config else None)
    more = f', revision="{model.revision}"' if model.revision and hub_id(base) else ""
    lines = [f"pipeline = DiffusionPipeline.from_pretrained({_text(place)}{more})"]
    if not vae:
        return ["from diffusers import DiffusionPipeline\n", *lines]
    read = f"pipeline.vae = AutoencoderKL.from_pretrained({_text(place_of(vae, repo))})"
    return ["from diffusers import AutoencoderKL, DiffusionPipeline\n", *lines, read]


def _text(value: str) -> str:
    """Quote for Python."""
    return json.dumps(value, ensure_ascii=False)


def place_of(name: str, repo: str | None) -> str:
    """Write a model's name for a reader of the card: on the hub nobody knows this machine's
    paths."""
    if hub_id(name):
        return name
    return f"path/to/{Path(name).name}" if repo else str(Path(name).resolve())

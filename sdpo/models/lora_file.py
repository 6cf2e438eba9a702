"""LoRA files as people share them, in the naming of peft, of diffusers or of kohya's scripts, read
whole: every name must be that of a layer of the UNet at hand.

kohya's names are those of the UNet's layers with underscores for dots: of diffusers' names for
SD1.x, of the original layout's for SDXL. Both are looked for in either family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError
from sdpo.config.families import FAMILIES, FamilyFacts, family_of_config
from sdpo.models.loading import read_state_dict
from sdpo.models.locations import TEXT_LORA, refuse_text_lora
from sdpo.models.original import unet_blocks, unet_name

KOHYA_PREFIX = "lora_unet_"
METADATA = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
_KINDS = (
    (re.compile(r"(.+)\.lora(_A|_down|\.down)(\.default)?\.weight"), "down"),
    (re.compile(r"(.+)\.lora(_B|_up|\.up)(\.default)?\.weight"), "up"),
    (re.compile(r"(.+)\.lora_magnitude_vector(\.default)?(\.weight)?"), "magnitude"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
)
_PART = re.compile(r"^(unet|transformer)\.")


@dataclass
class Layer:
    """Holds one layer's adapter: `down` (rank, inputs, ...), `up` (outputs, rank, ...), `alpha`,
    and DoRA's length of each row or None."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.down)


def read_lora(path: Path, unet: Any, flag: str, beside_text: bool = False) -> dict[str, Layer]:
    """Read a LoRA file for `unet`; returns the adapters by the names of its layers.

    Args:
        unet: plain or with adapters.
        flag: that named the file, for messages.
        beside_text: the file may adapt the text encoders too, or them alone; their part is read by
            `sdpo.models.lora_text`.

    Raises:
        UserError: unreadable, of the text encoder too, or with a name, shape or kind of adapter
            that has no place in this UNet.
    """
    where = f"{flag} {path}"
    state = read_state_dict(path)
    if not beside_text:
        refuse_text_lora(state, where)
    layers = adaptable(unet)
    own = {_plain(name): value for name, value in state.items() if not TEXT_LORA.match(name)}
    about = settings(path, f"{facts_of(unet).part}.")
    return adapters(own, layers, _known_names(layers, unet), about, where)


def adaptable(module: nn.Module) -> dict[str, Any]:
    """List a model's linear layers and convolutions by their names without adapters."""
    return {
        name.replace(".base_layer", ""): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def adapters(
    state: dict[str, Tensor],
    layers: Mapping[str, Any],
    known: Mapping[str, str],
    settings: dict[str, Any],
    where: str,
    what: str = "UNet",
) -> dict[str, Layer]:
    """Put the weights of one model's adapters together.

    Args:
        state: by names without the model's prefix.
        layers: of the model.
        known: every way in which a file may name a layer, to its name.
        settings: what the file's metadata says of these adapters.
        where: names the file, for messages, and `what` the model.

    Raises:
        UserError: see `read_lora`.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        stem, kind = _parsed(name)
        layer = known.get(stem or "")
        if layer is None or kind is None:
            raise UserError(
                f"{where}: its {name} fits no linear layer or convolution of this {what}; is it a "
                "LoRA of another family, or another kind of adapter?"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"{where} is broken: its {name} holds values that are not finite")
        parts.setdefault(layer, {})[kind] = value.float()
    return {
        name: _layer(name, layers[name], found, settings, where) for name, found in parts.items()
    }


def facts_of(model: Any) -> FamilyFacts:
    """Find the family of a denoiser, plain, with adapters or sharded (a subclass)."""
    names = (cls.__name__ for cls in type(model).__mro__)
    found = (family_of_config({**model.config, "_class_name": name}) for name in names)
    return FAMILIES[next(family for family in found if family)]


def _known_names(layers: Iterable[str], model: Any) -> dict[str, str]:
    """Every way in which a file may name a layer, to the layer's name."""
    known = {}
    for name in layers:
        known[name] = name
        known[kohya_name(name)] = name
    if facts_of(model).part == "unet":
        blocks = unet_blocks(model.config)
        known |= {kohya_name(unet_name(name, blocks)): name for name in layers}
    return known


def kohya_name(name: str) -> str:
    """Give kohya's name of a layer: underscores for dots, behind a prefix."""
    return KOHYA_PREFIX + name.replace(".", "_")


def _plain(name: str) -> str:
    name = _PART.sub("", name.removeprefix("base_model.model."))
    # The first naming of diffusers, of attention processors.
    name = name.replace(".processor.", ".").replace(".to_out_lora.", ".to_out.0.lora.")
    return re.sub(r"\.(to_[qkv])_lora\.", r".\1.lora.", name)


def _parsed(name: str) -> tuple[str | None, str | None]:
    for pattern, kind in _KINDS:
        if match := pattern.fullmatch(name):
            return match[1], kind
    return None, None


def settings(path: Path, prefix: str) -> dict[str, Any]:
    """Read what diffusers' metadata says of the adapters of the model with this prefix; {} where
    there is none."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    found = json.loads(text) if text else {}
    return {
        name.removeprefix(prefix): value
        for name, value in found.items()
        if name.startswith(prefix) or "." not in name
    }


def _layer(
    name: str, module: Any, found: dict[str, Tensor], settings: dict[str, Any], where: str
) -> Layer:
    if not {"down", "up"} <= found.keys():
        lacks = "down" if "down" not in found else "up"
        raise UserError(f"{where}: of {name} it has no {lacks} weights; the file is not whole")
    down, up = found["down"], found["up"]
    rank = len(down)
    # A 1 x 1 convolution is a linear layer to some programs.
    right = module.weight.shape[0] * rank == up.numel() and up.flatten(1).shape[-1] == rank
    if not right or module.weight[0].numel() * rank != down.numel():
        raise UserError(
            f"{where}: its weights of {name}, {tuple(down.shape)} and {tuple(up.shape)}, do not "
            f"fit a layer of shape {tuple(module.weight.shape)}; is it a LoRA of another family?"
        )
    if settings.get("use_rslora"):
        raise UserError(f"{where} is scaled by the square root of its rank (rslora), unlike here")
    patterns = settings.get("alpha_pattern") or {}
    pattern = next((v for k, v in patterns.items() if f".{name}".endswith(f".{k}")), None)
    alpha = pattern if pattern is not None else settings.get("lora_alpha", rank)
    alpha = found["alpha"].item() if "alpha" in found else alpha
    magnitude = found.get("magnitude")
    return Layer(
        down.reshape(rank, *module.weight.shape[1:]),
        up.reshape(-1, rank, *[1] * (module.weight.ndim - 2)),
        float(alpha),
        None if magnitude is None else magnitude.flatten(),
    )


def merge_lora(unet: Any, path: Path, flag: str) -> None:
    """Add the UNet's part of a LoRA file into the weights of a plain `unet`, in place.

    Raises:
        UserError: see `read_lora`.
    """
    merge(unet, read_lora(path, unet, flag, beside_text=True))


@torch.no_grad()
def merge(module: nn.Module, layers: dict[str, Layer]) -> None:
    """Add adapters into the weights of a model, in place."""
    for name, layer in layers.items():
        weight: Any = module.get_submodule(name).weight
        weight.copy_(added(weight, layer.down, layer.up, layer.alpha / layer.rank, layer.magnitude))


def added(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None
) -> Tensor:
    """Compute W + scale B A in float32, and with DoRA that at its rows' trained length.

    Args:
        weight: (outputs, inputs) or that of a convolution.
        down, up: (rank, inputs, ...) and (outputs, rank, ...).
        magnitude: of each row, or None.
    """
    # Of a convolution A is one of the same size with `rank` channels and B a 1 x 1 one.
    product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    total = weight.float() + scale * product
    if magnitude is None:
        return total
    rows = total.flatten(1)
    return (rows * (magnitude.flatten() / rows.norm(dim=1))[:, None]).reshape(weight.shape)


def kohya_state(layers: dict[str, Layer], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name adapters as kohya's scripts do: SDXL's layers by the original layout's names.

    Args:
        layers: by diffusers' names.
        config: of the UNet.
    """
    blocks = unet_blocks(config)
    sdxl = family_of_config(dict(config)) == "sdxl"
    state = {}
    for name, layer in layers.items():
        stem = kohya_name(unet_name(name, blocks) if sdxl else name)
        state[f"{stem}.lora_down.weight"] = layer.down
        state[f"{stem}.lora_up.weight"] = layer.up
        state[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    return state

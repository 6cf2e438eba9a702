"""The text encoders' part of LoRA files, in kohya's naming (lora_te_, lora_te1_, lora_te2_) or
diffusers' (text_encoder., text_encoder_2.)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.models.loading import read_state_dict
from sdpo.models.locations import TEXT_LORA
from sdpo.models.lora_file import Layer, adaptable, adapters, merge, settings

# Names that the attention's projections had in diffusers' first files.
_FIRST = {
    f".{old}_lora.": f".{new}.lora."
    for old, new in (
        ("to_q", "q_proj"),
        ("to_k", "k_proj"),
        ("to_v", "v_proj"),
        ("to_out", "out_proj"),
    )
}


def merge_text_lora(encoders: Sequence[Any], path: Path, flag: str) -> None:
    """Add the text encoders' part of a LoRA file into their weights, in place; nothing where it has
    none.

    Raises:
        UserError: see `read_text_lora`.
    """
    for encoder, layers in zip(encoders, read_text_lora(path, encoders, flag), strict=True):
        merge(encoder, layers)


def read_text_lora(path: Path, encoders: Sequence[Any], flag: str) -> list[dict[str, Layer]]:
    """Read the adapters of each text encoder by the names of its layers.

    Raises:
        UserError: unreadable, of more encoders than there are, or with a name, shape or kind of
            adapter that has no place in them.
    """
    where = f"{flag} {path}"
    states: list[dict[str, Tensor]] = [{} for _ in encoders]
    for name, value in read_state_dict(path).items():
        match = TEXT_LORA.match(name)
        if match is None:
            continue
        number = int(match[1] or match[2] or 1)
        if number > len(encoders):
            raise UserError(
                f"{where}: its {name} adapts text encoder {number}, and the base has "
                f"{len(encoders)}; is it a LoRA of another family?"
            )
        states[number - 1][_plain(name[match.end() :])] = value
    found = []
    for i, (state, encoder) in enumerate(zip(states, encoders, strict=True)):
        layers, what = adaptable(encoder), f"text_encoder{f'_{i + 1}' if i else ''}"
        told = settings(path, f"{what}.")
        found.append(adapters(state, layers, _known_names(layers), told, where, what))
    return found


def _plain(name: str) -> str:
    for old, new in _FIRST.items():
        name = name.replace(old, new)
    return name.replace(".lora_linear_layer.", ".lora.")


def _known_names(layers: dict[str, Any]) -> dict[str, str]:
    """Every way in which a file may name a layer. Libraries differ in whether a text encoder's
    names begin with text_model."""
    known: dict[str, str] = {}
    for name in layers:
        short = name.removeprefix("text_model.")
        for written in (name, short, f"text_model.{short}"):
            known |= {written: name, written.replace(".", "_"): name}
    return known

"""Reading UNet weights from wherever they are: strictly, and never by running pickled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line
from sdpo.models.locations import WEIGHT_SUFFIXES


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth/.pt/.bin (weights_only) or .safetensors file, on the CPU.

    Raises:
        UserError: missing, truncated, or not a plain state dict.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Truncated zips, pickles with code and foreign files each raise something else.
    except Exception as error:
        raise UserError(f"cannot read UNet weights from {path}: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a plain state dict of a UNet (name to tensor)")
    return state


def load_strictly(unet: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load `state` into `unet`; every name and every shape must fit.

    Raises:
        UserError: saying how many names or shapes do not fit and one of them.
    """
    own = unet.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape")):
        if names:
            raise UserError(
                f"{where} does not fit this UNet: {len(names)} of {len(own)} weights are {what} "
                f"(e.g. {names[0]}); is it of another family or size?"
            )
    unet.load_state_dict(state, strict=True)


def is_weights_file(name: str) -> bool:
    """Whether a name means one file of weights (rather than a directory or a hub id)."""
    return Path(name).suffix in WEIGHT_SUFFIXES


def from_pretrained(cls: Any, flag: str, name: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained(name, ...)`, its failures as one sentence.

    Raises:
        UserError: nothing of the kind there, or no network and no cache; names `flag`.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    try:
        return cls.from_pretrained(name, **kwargs)
    # OSError where files are missing, but ValueError and hub errors occur as well.
    except Exception as error:
        part = kwargs.get("subfolder")
        raise UserError(
            f"{flag}: cannot load {part + ' from ' if part else ''}{name} ({first_line(error)}); "
            "give a hub id this machine can reach or has in --cache_dir, or a local directory in "
            "diffusers layout"
        ) from error

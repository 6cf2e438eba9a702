"""Loading models from wherever they are: whole or not at all, never by running pickled code.

A library's own `from_pretrained` gives what a file lacks random values and says so in a log. Here a
weight that is missing, unknown or of another shape is an error; what training programs add around
the names (prefixes) and around the state dict (wrappers) is taken off.
"""

from __future__ import annotations

import inspect
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line
from sdpo.common.hub import look_for_hub
from sdpo.models.locations import WEIGHT_SUFFIXES

log = logging.getLogger(__name__)

# Under these keys training programs keep a state dict beside other things, in the order of trust.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "unet", "params")
# Weights that a file may have beside the model's: buffers of older versions of the libraries, and
# the other parts of a CLIP of which the text encoder alone is loaded.
_HARMLESS = re.compile(
    r"(.*\.)?(position_ids|num_batches_tracked)|(vision_model|visual_projection)\..*"
    r"|text_projection\.weight|logit_scale"
)
_ADAPTER = re.compile(r"lora_|\.hada_|\.lokr_|(^|\.)dora_scale$|oft_")
_ORIGINAL_LAYOUT = "model.diffusion_model."


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a .pth/.pt/.bin/.ckpt (weights_only) or .safetensors file, on the CPU,
    out of the wrapper that a training program put around it.

    Raises:
        UserError: missing, truncated, or without a state dict.
    """
    try:
        found = load_tensors(path)
    # Truncated zips, pickles with code and foreign files each raise something else.
    except Exception as error:
        raise UserError(f"cannot read UNet weights from {path}: {first_line(error)}") from None
    state, wrapper = _unwrapped(found)
    if state is None:
        raise UserError(f"{path} is not a plain state dict of a UNet (name to tensor)")
    if wrapper:
        log.info("%s: its state dict lies under %s", path, wrapper)
    return state


def load_tensors(path: Path) -> Any:
    """Load what a file of weights holds, to the CPU, without running pickled code; a file that is
    missing or broken raises whatever its format's reader raises."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # Mapped where the format allows it (since torch 1.6), so that a large file is in memory once.
    mapped = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _unwrapped(found: Any) -> tuple[dict[str, Tensor] | None, str]:
    """The state dict in what a file holds, if there is one, and the keys under which it lies."""
    if not isinstance(found, Mapping) or not found:
        return None, ""
    if all(isinstance(value, Tensor) for value in found.values()):
        return dict(found), ""
    for key in WRAPPERS:
        if isinstance(found.get(key), Mapping):
            state, inner = _unwrapped(found[key])
            return state, f"{key}.{inner}" if inner else key
    return None, ""


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], where: str, what: str = "UNet"
) -> None:
    """Load `state` into `module`; every name, a common prefix aside, and every shape must fit.

    Args:
        where: names the file, for messages.
        what: names the module, for messages.

    Raises:
        UserError: saying how many names or shapes do not fit and one of them, or what the file is.
    """
    own = module.state_dict()
    state = _without_prefix(state, own, where)
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(k for k in state.keys() - own.keys() if not _is_harmless(k, what))
    shapes = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing and (kind := _another_kind(state)):
        raise UserError(f"{where} is {kind}, not the weights of a {what} alone")
    for names, wrong in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape")):
        if names:
            raise UserError(
                f"{where} does not fit this {what}: {len(names)} of {len(own)} weights are {wrong} "
                f"(e.g. {names[0]}); is it of another family or size?"
            )
    module.load_state_dict({name: state[name] for name in own}, strict=True)
    check_finite(module, where)


def check_finite(module: nn.Module, where: str) -> None:
    """Refuse a model with weights that are NaN or infinite.

    Raises:
        UserError: naming one of them; begins with `where`.
    """
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.numel() and not _is_finite(weight.detach()):
            raise UserError(
                f"{where} is broken: its weight {name} holds values that are not finite; give one "
                "from before that, or another file"
            )


def _is_finite(weight: Tensor) -> bool:
    # A NaN goes through both; no second tensor is made.
    least, most = torch.aminmax(weight)
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _is_harmless(name: str, what: str) -> bool:
    """Say whether a weight may lie beside those of a module of this class."""
    other_half = "Vision" in what and name.startswith("text_model.")
    return other_half or _HARMLESS.fullmatch(name) is not None


def _without_prefix(
    state: dict[str, Tensor], own: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """`state` without the prefix under which it has all of `own`'s names (`module.`, `_orig_mod.`,
    `unet.`, one within another); what lies beside that prefix is left out."""
    if own.keys() <= state.keys():
        return state
    longest = max(own, key=len)
    for name in state:
        prefix = name.removesuffix(longest)
        if prefix and name.endswith(f".{longest}") and all(prefix + k in state for k in own):
            log.info("%s: names without their prefix %s", where, prefix)
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    # Compiled parts carry their prefix in the middle of names.
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    return plain if own.keys() <= plain.keys() else state


def _another_kind(state: Mapping[str, Any]) -> str | None:
    if any(_ADAPTER.search(name) for name in state):
        return "a file of adapters (LoRA and the like; see --lora_init and --lora)"
    if any(name.startswith(_ORIGINAL_LAYOUT) for name in state):
        return "a single-file checkpoint in the original layout"
    return None


def is_weights_file(name: str) -> bool:
    """Say whether a name means one file of weights (rather than a directory or a hub id)."""
    return Path(name).suffix in WEIGHT_SUFFIXES


ADVICE = (
    "give a hub id this machine can reach or has in --cache_dir, or a local directory in diffusers "
    "layout"
)


def from_pretrained(cls: Any, flag: str, name: str, advice: str = ADVICE, **kwargs: Any) -> Any:
    """Call `cls.from_pretrained(name, ...)` and check that a model got all of its weights; where
    there are weights of the variant fp16 alone, those are taken.

    Args:
        flag: what named it, for messages.
        advice: what to do where nothing can be loaded, for messages.

    Raises:
        UserError: nothing of the kind there, no network and no cache, or weights that are missing,
            unknown or of another shape; names `flag`.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    part = kwargs.get("subfolder")
    where = f"{part + ' from ' if part else ''}{name}"
    try:
        if not Path(name).exists():
            look_for_hub()
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
            return cls.from_pretrained(name, **kwargs)
        model, report = _with_report(cls, name, kwargs)
    # OSError where files are missing, but ValueError and hub errors occur as well.
    except Exception as error:
        raise UserError(f"{flag}: cannot load {where} ({first_line(error)}); {advice}") from error
    wrong = {
        "missing": sorted(map(str, report["missing_keys"])),
        "unknown": sorted(
            k for k in report["unexpected_keys"] if not _is_harmless(k, cls.__name__)
        ),
        "of another shape": sorted(map(str, report["mismatched_keys"])),
    }
    if not any(wrong.values()):
        check_finite(model, f"{flag}: {where}")
        return model
    folder = Path(name, part or "")
    if wrong["missing"] and folder.is_dir():
        return _read_into(cls, folder, f"{flag}: {where}")
    found = "; ".join(f"{len(v)} {k} (e.g. {v[0]})" for k, v in wrong.items() if v)
    raise UserError(f"{flag}: {where} does not fit its configuration: of its weights {found}")


def _with_report(cls: Any, name: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model and what the library says of its weights."""
    try:
        return cls.from_pretrained(name, output_loading_info=True, **kwargs)
    except OSError as error:
        try:
            loaded = cls.from_pretrained(name, output_loading_info=True, variant="fp16", **kwargs)
        except Exception:
            raise error from None
        log.info("%s: its weights of the variant fp16", name)
        return loaded


def _read_into(cls: Any, folder: Path, where: str) -> Any:
    """A model of a local folder whose weights have other names than the library looks for."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHT_SUFFIXES]
    whole = [p for p in files if ".fp16." not in p.name and "ema" not in p.name] or files
    kind = [p for p in whole if p.suffix == ".safetensors"] or whole
    state: dict[str, Tensor] = {}
    for path in kind:
        state |= read_state_dict(path)
    if hasattr(cls, "load_config"):
        model = cls.from_config(cls.load_config(folder))
    else:
        model = cls(cls.config_class.from_pretrained(folder))
    load_strictly(model, state, where, cls.__name__)
    return model.eval()

"""Reading single-file checkpoints in the original layout, as model-sharing sites give them, through
diffusers' own conversion; what the conversion would pass over is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.config.families import FAMILIES, family_of_config
from sdpo.models.loading import from_pretrained, load_strictly, read_state_dict
from sdpo.models.original import UNET_PREFIX, VAE_PREFIX

_FIRST = "input_blocks.0.0.weight"
_CLIP = {
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}


def unet_weights(
    state: dict[str, Tensor], config: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """Give a UNet's weights by diffusers' names; a state dict in another layout is given back.

    Args:
        state: of a whole checkpoint, or of its UNet alone.
        config: of the UNet.
        where: names the file, for messages.

    Raises:
        UserError: it is of another family, predicts v, or has weights without a place.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixes = [name.removesuffix(_FIRST) for name in state if name.endswith(_FIRST)]
    prefix = next((p for p in prefixes if not p or p.endswith("diffusion_model.")), None)
    if prefix is None:
        return state
    if "v_pred" in state:
        raise UserError(
            f"{where} predicts v (it holds v_pred); the losses are defined for models that predict "
            "noise (epsilon)"
        )
    own = {
        UNET_PREFIX + k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
    }
    found = "sdxl" if f"{UNET_PREFIX}label_emb.0.0.weight" in own else "sd15"
    if found != family_of_config(dict(config)):
        raise UserError(f"{where} holds an {FAMILIES[found].label} UNet: {FAMILIES[found].advice}")
    converted = convert_ldm_unet_checkpoint(dict(own), config)
    if len(converted) != len(own):
        raise UserError(
            f"{where}: {len(own) - len(converted)} of its {len(own)} UNet weights have no place in "
            f"an {FAMILIES[found].label} UNet; is the file whole?"
        )
    return converted


def load_part(cls: Any, part: str, path: Path, flag: str, base: str, **kwargs: Any) -> Any:
    """Load the VAE or a text encoder of a single-file checkpoint, its configuration from a base.

    Args:
        cls: the model's class.
        part: vae, text_encoder or text_encoder_2.
        path: the checkpoint.
        flag: that named it, for messages.
        base: hub id or directory that has the part's configuration.
        kwargs: revision and cache_dir of `base`.

    Raises:
        UserError: the part is not in the file, not whole, or of another size.
    """
    where = f"{flag} {path}: its {part}"
    state = read_state_dict(path)
    if part == "vae":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        config = cls.load_config(base, subfolder=part, **kwargs)
        model = cls.from_config(config)
        own = {k: v for k, v in state.items() if k.startswith(VAE_PREFIX) and ".loss." not in k}
        weights = convert_ldm_vae_checkpoint(dict(own), config) if own else {}
    else:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        model = cls(from_pretrained(cls.config_class, flag, base, subfolder=part, **kwargs))
        prefix = next((p for p in _CLIP[part] if any(k.startswith(p) for k in state)), "\0")
        own = {k: v for k, v in state.items() if k.startswith(prefix)}
        if part == "text_encoder_2":
            weights = convert_open_clip_checkpoint(model, own, prefix) if own else {}
        else:
            weights = {k.removeprefix(prefix): v for k, v in own.items()}
        # Files and versions of transformers differ in whether they have this prefix.
        inner = (
            "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
        )
        weights = {
            k if k == "text_projection.weight" else inner + k.removeprefix("text_model."): v
            for k, v in weights.items()
        }
    if not own:
        raise UserError(f"{where} is not in the file; is it of another family, or a UNet alone?")
    load_strictly(model, weights, where, cls.__name__)
    return model

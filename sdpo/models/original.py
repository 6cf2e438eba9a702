"""The original layout of SD1.x and SDXL: one file of all weights, under the names that the model's
first code gave them and that most programs for images read.

Names follow CompVis' stable-diffusion and Stability's generative-models: blocks of the UNet are
numbered through (`input_blocks`, `middle_block`, `output_blocks`), the VAE's decoder is numbered
from its fine end, and SDXL's second text encoder has OpenCLIP's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = (
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Map the parts of a UNet, by the start of their names in diffusers, to the original's.

    Args:
        config: the UNet's, of diffusers.
    """
    layers = config["layers_per_block"]
    blocks = dict(_UNET_ENDS)
    number = 1
    downs = len(config["down_block_types"])
    for block in range(downs):
        for layer in range(layers):
            blocks[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < downs - 1:
            name = f"down_blocks.{block}.downsamplers.0.conv"
            blocks[name] = f"input_blocks.{number}.0.op"
            number += 1
    for name, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        blocks[f"mid_block.{name}"] = f"middle_block.{place}"
    number = 0
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            blocks[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        # After the last layer's attention, where it has one.
        place = 2 if "CrossAttn" in kind else 1
        name = f"up_blocks.{block}.upsamplers.0.conv"
        blocks[name] = f"output_blocks.{number - 1}.{place}.conv"
    return blocks


def unet_name(name: str, blocks: Mapping[str, str]) -> str:
    """Give the original name of a UNet's weight or module.

    Args:
        name: in diffusers, e.g. down_blocks.0.resnets.1.conv1.weight.
        blocks: as `unet_blocks` gives them.

    Raises:
        ValueError: the original layout has no such part.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        start = ".".join(parts[:end])
        if start not in blocks:
            continue
        rest = parts[end:]
        if ".resnets." in start and rest:
            rest[0] = _RESNET.get(rest[0], rest[0])
        return ".".join([blocks[start], *rest])
    raise ValueError(name)


def unet_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a UNet's state dict to the original layout, with its prefix.

    Raises:
        ValueError: the layout has no place for one of its weights; names it.
    """
    blocks = unet_blocks(config)
    return {UNET_PREFIX + unet_name(name, blocks): value for name, value in state.items()}


def vae_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a VAE's state dict to the original layout, with its prefix; the attention's linear
    layers become 1 x 1 convolutions."""
    levels = len(config["block_out_channels"])
    renamed = {}
    for name, value in state.items():
        new = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        new = re.sub(r"\bdown_blocks\.", "down.", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda f: f"mid.block_{int(f[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
        new = new.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid.attn_1." in new:
            start, rest = new.split("mid.attn_1.")
            part, kind = rest.rsplit(".", 1)
            new = f"{start}mid.attn_1.{_VAE_ATTENTION[part]}.{kind}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        renamed[VAE_PREFIX + new] = value
    return renamed


def text_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rename the state dicts of the text encoders, one (SD1.x) or two (SDXL), to the original
    layout, with their prefixes."""
    first = {f"transformer.text_model.{k}": v for k, v in _plain_names(states[0])}
    if len(states) == 1:
        return {f"cond_stage_model.{k}": v for k, v in first.items()}
    second = _open_clip(dict(_plain_names(states[1])))
    return {
        **{f"conditioner.embedders.0.{k}": v for k, v in first.items()},
        **{f"conditioner.embedders.1.model.{k}": v for k, v in second.items()},
    }


def _plain_names(state: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    # Versions of transformers differ in whether they have the prefix.
    return ((name.removeprefix("text_model."), value) for name, value in state.items())


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T.contiguous()
            continue
        if re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue
        if ".self_attn.q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            value = torch.cat(parts)
            name = name.replace(".q_proj.", ".in_proj_")
        for old, new in _OPEN_CLIP:
            name = re.sub(old, new, name)
        renamed[name] = value
    return renamed

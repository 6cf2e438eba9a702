"""ImageReward (Xu et al. 2023): a BLIP reads the caption while looking at the image, and a chain of
linear maps turns the state of its first token into a reward."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdpo.common.errors import UserError, first_line
from sdpo.evaluation.score.base import BaseScorer, check_size, frozen
from sdpo.evaluation.score.scorers.aesthetics import AestheticHead
from sdpo.evaluation.score.views import clip_pixels
from sdpo.evaluation.score.weights import (
    TOKENIZER_FILES,
    Part,
    Weights,
    load_exactly,
    read_tensors,
)

if TYPE_CHECKING:
    from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

TOKENS = 35
HEAD_WIDTH = 64
# Mean and standard deviation of the rewards over the authors' own data.
REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072

CONFIG_FILE = "med_config.json"
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# The published file is a whole BLIP in training: projections of its contrastive loss and what else
# does not begin with one of the three above plays no part in the reward. This one is a constant.
_CONSTANT = "embeddings.position_ids"
# Of the text encoder's configuration, what BLIP's has too.
_TEXT_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
)
# Names of timm's ViT to those of transformers' BLIP.
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class Scorer(BaseScorer):
    """Larger is better; about 0 on average over the authors' data, with standard deviation 1."""

    label = "ImageReward"
    parts = {  # noqa: RUF012
        "model": Part(hub="zai-org/ImageReward", file="ImageReward.pt"),
        "config": Part(hub="zai-org/ImageReward", file=CONFIG_FILE, beside="model"),
        "tokenizer": Part(hub="bert-base-uncased", files=TOKENIZER_FILES),
    }

    def __init__(self, weights: Weights, device: torch.device) -> None:
        path = weights.file("model")
        config, config_path = _read_config(weights)
        self.tokenizer = load_tokenizer(weights)
        if len(self.tokenizer) != config.get("vocab_size"):
            raise UserError(
                f"{weights.flag('tokenizer')}: {weights.source('tokenizer')} has "
                f"{len(self.tokenizer)} tokens with the two that are added, but {config_path} says "
                f"vocab_size {config.get('vocab_size')}"
            )
        state = read_tensors(path, weights.flag())
        where = f"{weights.flag()}={path}"
        vision, text, head = (_below(state, prefix, where) for prefix in (_VISION, _TEXT, _HEAD))
        text.pop(_CONSTANT, None)
        self.vision = frozen(build_vision(vision, where), device)
        width = self.vision.config.hidden_size
        self.text = frozen(build_text(text, config, width, where, config_path), device)
        maps = AestheticHead(self.text.config.hidden_size)  # the same chain of maps
        load_exactly(maps, head, where)
        self.head = frozen(maps, device)
        self.device = device

    def tokens(self, prompts: list[str]) -> Any:
        """Tokenize B prompts to `input_ids` and `attention_mask`, each (B, 35); longer ones are
        cut."""
        cut = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
        return self.tokenizer(prompts, **cut, return_tensors="pt")

    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokens(prompts).to(self.device)
        # Every patch is attended to, so the image needs no mask.
        seen = self.vision(pixel_values=clip_pixels(views)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
        ).last_hidden_state
        # The head's maps multiply errors; it costs nothing to keep it in float32.
        with torch.autocast(views.device.type, enabled=False):
            return (self.head(read[:, 0].float()) - REWARD_MEAN) / REWARD_STD


def load_tokenizer(weights: Weights) -> BertTokenizer:
    """Load BERT's tokenizer, with the two tokens that BLIP adds at the end of its vocabulary.

    Raises:
        UserError: not to be had.
    """
    from transformers import BertTokenizer

    tokenizer = weights.pretrained(BertTokenizer, "tokenizer")
    # Where it finds no vocabulary the library makes one of the special tokens, without a word.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        source = weights.source("tokenizer")
        raise UserError(
            f"imagereward: cannot load {source}: no vocabulary there, or not to be reached; put "
            f"the files of {weights.parts['tokenizer'].source} into a directory and give "
            f"{weights.flag('tokenizer')}=DIR"
        )
    # In this order: it decides their ids.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def build_vision(state: dict[str, Tensor], where: str) -> BlipVisionModel:
    """Build BLIP's image encoder from a ViT's weights in timm's names; they tell its size.

    Raises:
        UserError: something is missing or does not fit; it is not for images of 224 px.
    """
    from transformers import BlipVisionConfig, BlipVisionModel

    for name, dimensions in (("patch_embed.proj.weight", 4), ("pos_embed", 3)):
        if name not in state or state[name].ndim != dimensions:
            raise UserError(f"{where} is not ImageReward's: no {_VISION}{name} of a ViT in it")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    check_size(side, where)
    hidden = state.get("blocks.0.mlp.fc1.bias")
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width if hidden is None else len(hidden),
        num_hidden_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=side,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    # On meta no random weights are drawn; all of them come from the file.
    with torch.device("meta"):
        model = BlipVisionModel(config)
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    load_exactly(model, renamed, where)
    return model


def build_text(
    state: dict[str, Tensor],
    config: dict[str, Any],
    image_width: int,
    where: str,
    config_path: Path,
) -> BlipTextModel:
    """Build BLIP's text encoder, which attends to an encoded image, (B, tokens, image_width).

    Raises:
        UserError: `config` (of the file `config_path`) or `state` does not fit it.
    """
    from transformers import BlipTextConfig, BlipTextModel

    missing = [name for name in _TEXT_CONFIG if name not in config]
    if missing:
        raise UserError(f"{config_path} has no {missing[0]}; it should be ImageReward's own")
    try:
        text_config = BlipTextConfig(
            **{name: config[name] for name in _TEXT_CONFIG},
            pad_token_id=config.get("pad_token_id", 0),
            encoder_hidden_size=image_width,
            is_decoder=True,  # its word for: with cross attention
        )
        with torch.device("meta"):
            model = BlipTextModel(text_config, add_pooling_layer=False)
    # The library checks types and divisibility with errors of several classes.
    except Exception as error:
        raise UserError(f"{config_path} describes no text encoder: {first_line(error)}") from None
    load_exactly(model, state, where)
    positions = torch.arange(text_config.max_position_embeddings)
    model.embeddings.position_ids = positions.expand((1, -1))
    return model


def _read_config(weights: Weights) -> tuple[dict[str, Any], Path]:
    """The text encoder's configuration, and the file that it is from."""
    path = weights.file("config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{weights.flag('config')}: cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{weights.flag('config')}: {path} is not a JSON object")
    return config, path


def _below(state: Any, prefix: str, where: str) -> dict[str, Tensor]:
    """What a state dict holds under a prefix, without it."""
    names = [name for name in state if name.startswith(prefix)] if isinstance(state, dict) else []
    if not names:
        raise UserError(f"{where} is not ImageReward's: nothing in it is named {prefix}*")
    return {name[len(prefix) :]: state[name] for name in names}

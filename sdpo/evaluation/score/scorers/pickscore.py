"""PickScore (Kirstain et al. 2023): cosine of image and text in a CLIP ViT-H/14 that was fine-tuned
on Pick-a-Pic's choices, without the logit scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.common.errors import UserError
from sdpo.evaluation.score.base import BaseScorer, check_size, cosine, frozen
from sdpo.evaluation.score.views import clip_pixels
from sdpo.evaluation.score.weights import TOKENIZER_FILES, Part, Weights

TOKENS = 77


def check_tokenizer(tokenizer: Any, config: Any, weights: Weights, part: str) -> None:
    """Refuse a tokenizer that is not the text encoder's: it pools the state at the last token's id.

    Raises:
        UserError: naming the part.
    """
    # Configurations of before transformers 4.30 say 2 and mean the largest id.
    last = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = tokenizer([""]).input_ids[0]
    if len(tokenizer) != config.vocab_size or ids[-1:] != [last]:
        raise UserError(
            f"{weights.flag(part)}: {weights.source(part)} is not the tokenizer of this model: "
            f"{len(tokenizer)} tokens, a text ends with {ids[-1:]}, but the model has "
            f"{config.vocab_size} and reads to [{last}]"
        )


def tokenizer_part(weights: Weights) -> str:
    """Name the part that the tokenizer is loaded from: a user's own model may have one."""
    own = Path(weights.source("model"))
    beside = any((own / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return "model" if beside and "processor" not in weights.overrides else "processor"


class Scorer(BaseScorer):
    """Larger is better; published models lie around 0.2."""

    label = "PickScore"
    parts = {  # noqa: RUF012
        "model": Part(hub="yuvalkirstain/PickScore_v1"),
        "processor": Part(hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", files=TOKENIZER_FILES),
    }

    @classmethod
    def needed(cls, weights: Weights) -> list[str]:
        """Name the model alone where the tokenizer lies beside it."""
        return list(dict.fromkeys(["model", tokenizer_part(weights)]))

    def __init__(self, weights: Weights, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = frozen(weights.pretrained(CLIPModel, "model"), device)
        check_size(self.model.config.vision_config.image_size, weights.flag())
        part = tokenizer_part(weights)
        self.tokenizer = weights.pretrained(AutoTokenizer, part)
        check_tokenizer(self.tokenizer, self.model.config.text_config, weights, part)
        self.device = device

    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            for_tokenizer(self.tokenizer, prompts),
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self.device)
        # Projected here rather than by get_image_features, whose result differs between versions.
        model = self.model
        seen = model.vision_model(pixel_values=clip_pixels(views)).pooler_output
        read = model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return cosine(model.visual_projection(seen), model.text_projection(read))

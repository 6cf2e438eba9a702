"""PickScore (Kirstain et al. 2023): cosine of image and text in a CLIP ViT-H/14 that was fine-tuned
on Pick-a-Pic's choices, without the logit scale."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.evaluation.score.base import BaseScorer, check_size, cosine, frozen
from sdpo.evaluation.score.views import clip_pixels
from sdpo.evaluation.score.weights import Part, Weights

TOKENS = 77


class Scorer(BaseScorer):
    """Larger is better; published models lie around 0.2."""

    label = "PickScore"
    parts = {  # noqa: RUF012
        "model": Part(hub="yuvalkirstain/PickScore_v1"),
        "processor": Part(hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    }

    def __init__(self, weights: Weights, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = frozen(weights.pretrained(CLIPModel, "model"), device)
        check_size(self.model.config.vision_config.image_size, weights.flag())
        own = Path(weights.source("model"))
        beside = any((own / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        part = "model" if beside and "processor" not in weights.overrides else "processor"
        self.tokenizer = weights.pretrained(AutoTokenizer, part)
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

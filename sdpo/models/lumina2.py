"""Lumina-Image 2.0: a joint transformer under rectified flow; Gemma for captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Frozen
from sdpo.models.transformer import TransformerFamily


class Lumina2(TransformerFamily):
    """Transformer conditioned on Gemma's hidden states, before its last layer, of a caption behind
    the pipeline's own instruction. It is told 1 - sigma, and its output is x_0 - eps."""

    name = "lumina-2"
    caption_tokens = 256

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run Gemma: `hidden` (B, 256, width), `mask` (B, 256)."""
        return self.encode_prompts(frozen, captions)

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer, whose output points to the image; see `Family.predict`."""
        output: Tensor = model(
            hidden_states=x_t,
            timestep=1 - t.expand(len(x_t)),
            encoder_hidden_states=conditions["hidden"],
            encoder_attention_mask=conditions["mask"].long(),
            return_dict=False,
        )[0]
        return -output

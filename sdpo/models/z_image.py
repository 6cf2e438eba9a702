"""Z-Image: a single-stream transformer under rectified flow; a language model for captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Frozen
from sdpo.models.transformer import TransformerFamily, padded


class ZImage(TransformerFamily):
    """Transformer conditioned on a language model's hidden states before its last layer. It is told
    1 - sigma, and its output is x_0 - eps."""

    name = "z-image"
    caption_tokens = 512

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the language model: `hidden` (B, 512, width), `mask` (B, 512)."""
        hidden, _ = self.text_pipeline(frozen).encode_prompt(
            list(captions),
            device=frozen.text_encoders[0].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.caption_tokens,
        )
        return padded(hidden, self.caption_tokens)

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer on a list of images and captions; see `Family.predict`."""
        captions = zip(conditions["hidden"], conditions["mask"].bool(), strict=True)
        output = model(
            list(x_t[:, :, None]),
            1 - t.expand(len(x_t)),
            [hidden[mask] for hidden, mask in captions],
            return_dict=False,
        )[0]
        return -torch.stack(list(output))[:, :, 0]

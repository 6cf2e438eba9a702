"""Stable Diffusion 1.x: one CLIP text encoder, its last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Family, Frozen, ModelSource
from sdpo.models.text import tokenize


class SD15(Family):
    """UNet conditioned on the text encoder's final, normalised hidden states."""

    name = "sd15"

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the text encoder; its last hidden states."""
        (encoder,), (tokenizer,) = frozen.text_encoders, frozen.tokenizers
        ids = tokenize(tokenizer, captions, encoder.device)
        return {"hidden": encoder(ids).last_hidden_state}

    def conditions(self, text: dict[str, Tensor], sizes: Tensor) -> Conditions:
        """Give `hidden` (N, tokens, width); sizes play no part."""
        return {"hidden": text["hidden"]}

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the UNet; see `Family.predict`."""
        output: Tensor = model(
            x_t, t, encoder_hidden_states=conditions["hidden"], return_dict=False
        )[0]
        return output

    def pipeline(self, unet: Any, frozen: Frozen, source: ModelSource) -> Any:
        """Build a `StableDiffusionPipeline` without a safety checker."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=frozen.vae,
            text_encoder=frozen.text_encoders[0],
            tokenizer=frozen.tokenizers[0],
            unet=unet,
            scheduler=self.load_sampler(source),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

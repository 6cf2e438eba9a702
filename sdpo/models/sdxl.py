"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding and size conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Family, Frozen, ModelSource
from sdpo.models.text import tokenize


class SDXL(Family):
    """UNet conditioned on the penultimate hidden states of both encoders, joined along the width,
    the pooled output of the second, and time ids: original size, crop corner and target size,
    which for the square crop are told as (R, R, 0, 0, R, R)."""

    name = "sdxl"

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run both text encoders: `hidden` (B, tokens, width 1 + width 2), `pooled` (B, width)."""
        hidden = []
        for tokenizer, encoder in zip(frozen.tokenizers, frozen.text_encoders, strict=True):
            ids = tokenize(tokenizer, captions, encoder.device)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return {"hidden": torch.cat(hidden, dim=-1), "pooled": output.text_embeds}

    def conditions(self, text: dict[str, Tensor], sizes: Tensor) -> Conditions:
        """Give `hidden` (N, tokens, width), `text_embeds` (N, width) and `time_ids` (N, 6)."""
        pooled = text["pooled"]
        return {
            "hidden": text["hidden"],
            "text_embeds": pooled,
            "time_ids": sizes.to(pooled.device, pooled.dtype),
        }

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the UNet; see `Family.predict`."""
        output: Tensor = model(
            x_t,
            t,
            encoder_hidden_states=conditions["hidden"],
            added_cond_kwargs={name: conditions[name] for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]
        return output

    def pipeline(self, unet: Any, frozen: Frozen, source: ModelSource) -> Any:
        """Build a `StableDiffusionXLPipeline` without a watermarker."""
        from diffusers import StableDiffusionXLPipeline

        try:
            config = StableDiffusionXLPipeline.load_config(
                source.base, revision=source.revision, cache_dir=source.cache_dir
            )
        except OSError:
            config = {}  # a base need not have model_index.json; SDXL's own default is taken
        return StableDiffusionXLPipeline(
            vae=frozen.vae,
            text_encoder=frozen.text_encoders[0],
            text_encoder_2=frozen.text_encoders[1],
            tokenizer=frozen.tokenizers[0],
            tokenizer_2=frozen.tokenizers[1],
            unet=unet,
            scheduler=self.load_sampler(source),
            force_zeros_for_empty_prompt=config.get("force_zeros_for_empty_prompt", True),
            add_watermarker=False,
        )

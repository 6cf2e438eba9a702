"""Sana: a linear transformer under rectified flow; a deep autoencoder, Gemma for captions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Frozen, config_of
from sdpo.models.transformer import TransformerFamily


class Sana(TransformerFamily):
    """Transformer conditioned on Gemma's hidden states of a caption behind the pipeline's own
    instruction. The autoencoder has no posterior: an image has one encoding."""

    name = "sana"
    caption_tokens = 300

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run Gemma on captions in lower case: `hidden` (B, 300, width), `mask` (B, 300)."""
        told = inspect.signature(self.pipeline_class().__call__).parameters
        instruction = told["complex_human_instruction"].default
        return self.encode_prompts(frozen, captions, complex_human_instruction=instruction)

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer, which is told 1000 sigma times its scale; see `Family.predict`."""
        scale = 1000 * config_of(model)["timestep_scale"]
        output: Tensor = model(
            x_t,
            encoder_hidden_states=conditions["hidden"],
            encoder_attention_mask=conditions["mask"],
            timestep=scale * t.expand(len(x_t)),
            return_dict=False,
        )[0]
        return output

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give prompts and sizes as they are."""
        options = super().call_options(pipeline, prompts, guidance)
        return options | {"use_resolution_binning": False}

    @torch.no_grad()
    def encode_posterior(self, frozen: Frozen, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels (N, 3, R, R), with a standard deviation of 0."""
        latents = frozen.vae.encode(pixels.to(frozen.vae.dtype)).latent
        return latents, torch.zeros_like(latents)

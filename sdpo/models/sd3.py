"""Stable Diffusion 3 and 3.5: a joint transformer under rectified flow; two CLIP encoders, T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.models.base import Conditions, Frozen
from sdpo.models.text import tokenize
from sdpo.models.transformer import TransformerFamily


class SD3(TransformerFamily):
    """Transformer conditioned on a sequence, both CLIP encoders' penultimate hidden states joined
    along the width and then T5's along the tokens, and on both pooled outputs. Of a base without T5
    its tokens are zeros, as many as CLIP's."""

    name = "sd3"
    caption_tokens = 256  # of T5

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the text encoders: `hidden` (B, tokens, width), `pooled` (B, width 1 + width 2)."""
        hidden, pooled = [], []
        for tokenizer, encoder in zip(frozen.tokenizers[:2], frozen.text_encoders[:2], strict=True):
            ids = tokenize(tokenizer, captions, encoder.device)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clip = torch.cat(hidden, dim=-1)
        width = frozen.denoiser["joint_attention_dim"]
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        t5 = torch.zeros_like(clip)
        if len(frozen.text_encoders) == 3:
            t5 = self._encode_t5(frozen, captions)
        return {"hidden": torch.cat([clip, t5], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def _encode_t5(self, frozen: Frozen, captions: list[str]) -> Tensor:
        tokenizer, encoder = frozen.tokenizers[2], frozen.text_encoders[2]
        ids = tokenizer(
            captions,
            padding="max_length",
            max_length=self.caption_tokens,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        hidden: Tensor = encoder(ids.to(encoder.device))[0]
        return hidden

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer, which is told 1000 sigma; see `Family.predict`."""
        output: Tensor = model(
            hidden_states=x_t,
            timestep=1000 * t.expand(len(x_t)),
            encoder_hidden_states=conditions["hidden"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
        return output

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give CLIP's encoders cleaned prompts and T5 the prompts themselves."""
        with_t5 = pipeline.text_encoder_3 is not None
        return {
            "prompt": for_tokenizer(pipeline.tokenizer, prompts),
            "prompt_3": list(prompts),
            "guidance_scale": guidance,
            "max_sequence_length": self.caption_tokens
            if with_t5
            else pipeline.tokenizer_max_length,
        }

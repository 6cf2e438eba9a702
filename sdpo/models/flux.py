"""FLUX.1: a joint transformer under rectified flow over packed latents, told its guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo.common.captions import for_tokenizer
from sdpo.models.base import Conditions, Frozen, config_of
from sdpo.models.transformer import TransformerFamily, pack, unpack

# What a model that was distilled from guided predictions is told in training, where it is not
# guided.
TRAINING_GUIDANCE = 1.0


class Flux(TransformerFamily):
    """Transformer conditioned on T5's hidden states and CLIP's pooled output."""

    name = "flux"
    caption_tokens = 512

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the text encoders: `hidden` (B, 512, width) of T5, `pooled` (B, width) of CLIP."""
        hidden, pooled, _ = self.text_pipeline(frozen).encode_prompt(
            prompt=for_tokenizer(frozen.tokenizers[0], captions),
            prompt_2=list(captions),
            device=frozen.text_encoders[0].device,
            max_sequence_length=self.caption_tokens,
        )
        return {"hidden": hidden, "pooled": pooled}

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer on packed latents, which is told sigma; see `Family.predict`."""
        height, width = x_t.shape[-2:]
        hidden = conditions["hidden"]
        guided = config_of(model)["guidance_embeds"]
        output: Tensor = model(
            hidden_states=pack(x_t),
            timestep=t.expand(len(x_t)),
            guidance=x_t.new_full((len(x_t),), TRAINING_GUIDANCE) if guided else None,
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=hidden,
            txt_ids=hidden.new_zeros(hidden.shape[1], 3),
            img_ids=positions(height // 2, width // 2).to(x_t),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give CLIP the cleaned prompts and T5 the prompts themselves."""
        return {
            "prompt": for_tokenizer(pipeline.tokenizer, prompts),
            "prompt_2": list(prompts),
            "guidance_scale": guidance,
            "max_sequence_length": self.caption_tokens,
        }


def positions(rows: int, columns: int) -> Tensor:
    """Number image tokens by their place, (rows columns, 3): 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)

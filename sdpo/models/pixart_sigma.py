"""PixArt-Sigma: a transformer that predicts noise under a schedule of betas; T5 for captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Frozen
from sdpo.models.transformer import TransformerFamily


class PixArtSigma(TransformerFamily):
    """Transformer conditioned on T5's hidden states. Beside the noise it predicts a variance, which
    neither the losses nor diffusers' samplers use."""

    name = "pixart-sigma"
    caption_tokens = 300

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run T5 on captions in lower case: `hidden` (B, 300, width), `mask` (B, 300)."""
        return self.encode_prompts(frozen, captions)

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer and leave out the variance; see `Family.predict`."""
        output: Tensor = model(
            x_t,
            timestep=t.expand(len(x_t)),
            encoder_hidden_states=conditions["hidden"],
            encoder_attention_mask=conditions["mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give prompts without the clean-up that depends on whether beautifulsoup4 is installed,
        and sizes as they are."""
        options = super().call_options(pipeline, prompts, guidance)
        return options | {"clean_caption": False, "use_resolution_binning": False}

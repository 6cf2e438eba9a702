"""Qwen-Image: a joint transformer under rectified flow; a video VAE, a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo.models.base import Conditions, Frozen
from sdpo.models.transformer import TransformerFamily, pack, padded, unpack


class QwenImage(TransformerFamily):
    """Transformer conditioned on the hidden states of a language model that was asked to describe
    the caption. The VAE takes an image as a video of one frame and normalises every channel."""

    name = "qwen-image"
    caption_tokens = 512

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the language model: `hidden` (B, 512, width), `mask` (B, 512)."""
        pipeline = self.text_pipeline(frozen)
        device = frozen.text_encoders[0].device
        hidden, mask = pipeline.encode_prompt(
            list(captions), device=device, max_sequence_length=self.caption_tokens
        )
        # None: all captions are of one length.
        kept = torch.ones(hidden.shape[:2], device=device) if mask is None else mask
        return padded([h[m.bool()] for h, m in zip(hidden, kept, strict=True)], self.caption_tokens)

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer on packed latents, which is told sigma; see `Family.predict`."""
        height, width = x_t.shape[-2:]
        output: Tensor = model(
            hidden_states=pack(x_t),
            timestep=t.expand(len(x_t)),
            encoder_hidden_states=conditions["hidden"],
            encoder_hidden_states_mask=conditions["mask"].long(),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give the guidance as that of two predictions, against an empty prompt."""
        return {
            "prompt": list(prompts),
            "negative_prompt": [" "] * len(prompts),
            "true_cfg_scale": guidance,
            "max_sequence_length": self.caption_tokens,
        }

    @torch.no_grad()
    def encode_posterior(self, frozen: Frozen, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels (N, 3, R, R) as videos of one frame; see `Family.encode_posterior`."""
        mean, std = super().encode_posterior(frozen, pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def latent_shape(
        self, frozen: Frozen, height: int, width: int | None = None
    ) -> tuple[int, int, int]:
        """Give (C, h, w) of the latents; see `Family.latent_shape`."""
        config = frozen.vae.config
        factor = 2 ** len(config.temperal_downsample)
        return config.z_dim, height // factor, (width or height) // factor

    def normalising(self, vae: Mapping[str, Any]) -> dict[str, Any]:
        """Choose the mean and standard deviation of every channel."""
        return {name: list(vae[name]) for name in ("latents_mean", "latents_std")}

    def normalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Bring every channel of (N, C, r, r) to mean 0 and standard deviation 1."""
        mean, std = _channels(latents, vae)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Undo `normalise`."""
        mean, std = _channels(latents, vae)
        return latents * std + mean


def _channels(latents: Tensor, vae: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    both = [latents.new_tensor(vae[name]) for name in ("latents_mean", "latents_std")]
    mean, std = (values.reshape(1, -1, 1, 1) for values in both)
    return mean, std

"""FLUX.2 klein: a joint transformer under rectified flow over patches of latents, which the VAE's
batch norm normalises; a language model for captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, pixel_unshuffle

from sdpo.models.base import Conditions, Frozen, ModelSource
from sdpo.models.flux import positions
from sdpo.models.locations import reader_of
from sdpo.models.transformer import TransformerFamily


class Flux2Klein(TransformerFamily):
    """Transformer conditioned on hidden states of three layers of a language model. Its latents are
    means of the VAE's posterior, 2 x 2 of them as channels of one, normalised by the VAE's own
    batch norm."""

    name = "flux2-klein"
    caption_tokens = 512

    @torch.no_grad()
    def encode_text(self, frozen: Frozen, captions: list[str]) -> dict[str, Tensor]:
        """Run the language model: `hidden` (B, 512, 3 widths)."""
        hidden, _ = self.text_pipeline(frozen).encode_prompt(
            list(captions),
            device=frozen.text_encoders[0].device,
            max_sequence_length=self.caption_tokens,
        )
        return {"hidden": hidden}

    def predict(self, model: Any, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer, a token a patch, which is told sigma; see `Family.predict`."""
        height, width = x_t.shape[-2:]
        hidden = conditions["hidden"]
        words = torch.arange(hidden.shape[1], device=x_t.device)[:, None]
        output: Tensor = model(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t.expand(len(x_t)),
            encoder_hidden_states=hidden,
            txt_ids=pad(words, (3, 0)),
            img_ids=pad(positions(height, width), (0, 1)).to(x_t.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (height, width))

    def pipeline(self, unet: Any, frozen: Frozen, source: ModelSource) -> Any:
        """Build the pipeline, which takes no guidance where the base was distilled to few steps."""
        pipeline = super().pipeline(unet, frozen, source)
        read = reader_of(source.base, source.revision, source.cache_dir)
        index = read("model_index.json") or {}
        pipeline.register_to_config(is_distilled=index.get("is_distilled", False))
        return pipeline

    @torch.no_grad()
    def encode_posterior(self, frozen: Frozen, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels (N, 3, R, R) to normalised patches, with a standard deviation of 0."""
        vae = frozen.vae
        mean, _ = super().encode_posterior(frozen, pixels)
        patches = pixel_unshuffle(mean, 2)
        centre, variance = (
            values.view(1, -1, 1, 1).to(patches)
            for values in (vae.bn.running_mean, vae.bn.running_var)
        )
        latents = (patches - centre) / torch.sqrt(variance + vae.config.batch_norm_eps)
        return latents, torch.zeros_like(latents)

    def latent_shape(
        self, frozen: Frozen, height: int, width: int | None = None
    ) -> tuple[int, int, int]:
        """Give (C, h, w) of the patches; see `Family.latent_shape`."""
        channels, rows, columns = super().latent_shape(frozen, height, width)
        return 4 * channels, rows // 2, columns // 2

    def normalising(self, vae: Mapping[str, Any]) -> dict[str, Any]:
        """Choose nothing: encodings are normal."""
        return {}

    def normalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Leave encodings as they are."""
        return latents

    def denormalise(self, latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
        """Leave encodings as they are."""
        return latents

"""What all diffusion transformers share: pipelines from parts, and latents packed to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.models.base import Conditions, Family, Frozen, ModelSource
from sdpo.models.checks import BASE_FLAG


class TransformerFamily(Family):
    """A family whose denoiser is a transformer. A part that a base has not is None to diffusers."""

    caption_tokens: ClassVar[int]  # of a caption, as diffusers' pipeline takes

    def check(self, source: ModelSource) -> None:
        """Check a base, and that this diffusers serves its family; see `Family.check`."""
        import diffusers

        self.pipeline_class()
        version, since = diffusers.__version__, self.facts.since
        if since and tuple(map(int, version.split(".")[:2])) < since:
            raise UserError(
                f"{BASE_FLAG}: {self.facts.label} needs diffusers {'.'.join(map(str, since))} or "
                f"later, and this is {version}: pip install -U diffusers"
            )
        super().check(source)

    def _components(self, frozen: Frozen) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        pairs = list(zip(frozen.text_encoders, frozen.tokenizers, strict=True))
        # Optional parts are the last ones.
        for (folder, part), pair in zip(
            self.facts.text.items(), [*pairs, *[(None, None)] * 3], strict=False
        ):
            parts[folder], parts[part.tokenizer] = pair
        return parts

    def text_pipeline(self, frozen: Frozen) -> Any:
        """Build diffusers' pipeline of the text encoders alone, for its `encode_prompt`."""
        return self.pipeline_class()(
            **self._components(frozen), transformer=None, vae=None, scheduler=None
        )

    def pipeline(self, unet: Any, frozen: Frozen, source: ModelSource) -> Any:
        """Build the family's pipeline."""
        return self.pipeline_class()(
            **self._components(frozen),
            transformer=unet,
            vae=frozen.vae,
            scheduler=self.load_sampler(source),
        )

    def encode_prompts(
        self, frozen: Frozen, captions: list[str], **options: Any
    ) -> dict[str, Tensor]:
        """Run the `encode_prompt` of a pipeline that masks: `hidden` (B, tokens, width), `mask` (B,
        tokens). An empty caption is what guidance takes, which has no instruction before it."""
        hidden, mask, none, no_mask = self.text_pipeline(frozen).encode_prompt(
            list(captions),
            not all(captions),
            device=frozen.text_encoders[0].device,
            max_sequence_length=self.caption_tokens,
            **options,
        )
        if none is not None:
            empty = torch.tensor([not caption for caption in captions], device=hidden.device)
            hidden = torch.where(empty[:, None, None], none, hidden)
            mask = torch.where(empty[:, None], no_mask, mask)
        return {"hidden": hidden, "mask": mask.to(hidden)}

    def call_options(
        self, pipeline: Any, prompts: Sequence[str], guidance: float
    ) -> dict[str, Any]:
        """Give prompts as they are."""
        return {
            "prompt": list(prompts),
            "guidance_scale": guidance,
            "max_sequence_length": self.caption_tokens,
        }

    def conditions(self, text: dict[str, Tensor], sizes: Tensor) -> Conditions:
        """Give `encode_text`'s output, cut to the longest caption where it has a `mask`, (N,
        tokens); sizes play no part."""
        if "mask" not in text:
            return dict(text)
        longest = int(text["mask"].bool().sum(1).max())  # half precision does not count so far
        return {"hidden": text["hidden"][:, :longest], "mask": text["mask"][:, :longest]}


def padded(hidden: list[Tensor], tokens: int) -> dict[str, Tensor]:
    """Stack captions of different lengths, each (n, width), to `hidden` (B, tokens, width), zeros
    behind, and `mask` (B, tokens), 1 where there is a token."""
    whole = hidden[0].new_zeros(len(hidden), tokens, hidden[0].shape[-1])
    mask = whole.new_zeros(whole.shape[:2])
    for i, one in enumerate(hidden):
        whole[i, : len(one)], mask[i, : len(one)] = one[:tokens], 1
    return {"hidden": whole, "mask": mask}


def pack(latents: Tensor) -> Tensor:
    """Make tokens of 2 x 2 latents: (B, C, h, w) to (B, h w / 4, 4 C)."""
    b, c, h, w = latents.shape
    grid = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`: (B, h w / 4, 4 C) to (B, C, h, w)."""
    b, _, channels = tokens.shape
    grid = tokens.reshape(b, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)

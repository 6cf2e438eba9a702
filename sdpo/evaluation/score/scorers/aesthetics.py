"""LAION's aesthetic predictor (sac+logos+ava1, ViT-L/14): a chain of linear maps on the normalised
image embedding of OpenAI's CLIP ViT-L/14. The prompt plays no part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdpo.evaluation.score.base import BaseScorer, check_size, frozen
from sdpo.evaluation.score.views import clip_pixels
from sdpo.evaluation.score.weights import Part, Weights, load_exactly, read_tensors


class AestheticHead(nn.Module):
    """Maps (B, width) embeddings to (B,) scores; no activations, and dropout only in training."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Score embeddings of unit length, (B, width)."""
        return self.layers(embedding).squeeze(-1)


class Scorer(BaseScorer):
    """Larger is better; a scale of about 1 to 10."""

    label = "Aesthetics"
    parts = {  # noqa: RUF012
        "model": Part(
            url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
            "sac%2Blogos%2Bava1-l14-linearMSE.pth",
            file="sac+logos+ava1-l14-linearMSE.pth",
            sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
        "clip": Part(hub="openai/clip-vit-large-patch14"),
    }

    def __init__(self, weights: Weights, device: torch.device) -> None:
        from transformers import CLIPVisionModelWithProjection

        path = weights.file("model")
        state = read_tensors(path, weights.flag("model"))
        clip = weights.pretrained(CLIPVisionModelWithProjection, "clip")
        check_size(clip.config.image_size, weights.flag("clip"))
        head = AestheticHead(clip.config.projection_dim)
        load_exactly(head, state, f"{weights.flag('model')}={path}")
        self.clip, self.head = frozen(clip, device), frozen(head, device)

    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        embedding = self.clip(pixel_values=clip_pixels(views)).image_embeds.float()
        # The head's maps multiply errors; it costs nothing to keep it in float32.
        with torch.autocast(views.device.type, enabled=False):
            return self.head(embedding / embedding.norm(dim=-1, keepdim=True))

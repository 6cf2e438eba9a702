"""CLIP score: cosine of image and text in open_clip's ViT-H/14 trained on LAION-2B, without the
logit scale."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from sdpo.evaluation.score.scorers import hpsv2
from sdpo.evaluation.score.views import clip_view
from sdpo.evaluation.score.weights import Part


class Scorer(hpsv2.Scorer):
    """Larger is better; published models lie around 0.3. Of HPSv2 it differs in the weights, which
    lie in the file as they are, and in the crop."""

    label = "CLIP"
    parts = {  # noqa: RUF012
        "model": Part(
            hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", file="open_clip_pytorch_model.bin"
        ),
    }

    @staticmethod
    def view(image: Image.Image) -> Tensor:
        """View the centre, uint8 (3, 224, 224)."""
        return clip_view(image)

    @staticmethod
    def state_of(held: Any, where: str) -> dict[str, Tensor]:
        """Take the weights as they lie in the file."""
        return held

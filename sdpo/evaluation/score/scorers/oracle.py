"""The tiny world's exact oracle: how well an image follows its caption, and how clean it is.

It has no weights; prompts must be captions of the tiny world (`prompts/tinyworld.json`)."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.evaluation.score.base import BaseScorer
from sdpo.evaluation.score.views import as_tensor
from sdpo.evaluation.score.weights import Weights
from sdpo.tinyworld import oracle, world


class Scorer(BaseScorer):
    """0 to 1, larger is better."""

    label = "Oracle"
    meaning = "how well an image follows its caption and how clean it is, 0 to 1"

    @staticmethod
    def view(image: Image.Image) -> Tensor:
        """View the image at the size at which the world is drawn, uint8 (3, 64, 64)."""
        size = (world.IMAGE_SIZE, world.IMAGE_SIZE)
        return as_tensor(image if image.size == size else image.resize(size, Image.Resampling.BOX))

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Load nothing: the oracle is code."""

    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        pixels = views.permute(0, 2, 3, 1).cpu().numpy()
        try:
            scores = [oracle.score(p, t).score for p, t in zip(pixels, prompts, strict=True)]
        except ValueError as error:
            raise UserError(
                f"oracle: {error}; it scores captions of the tiny world only, as those of "
                "prompts/tinyworld.json"
            ) from None
        return torch.tensor(scores)

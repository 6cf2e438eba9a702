"""What a scorer is: a view of an image, weights that it names, a number per image and prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from sdpo.evaluation.score.views import clip_view
from sdpo.evaluation.score.weights import Part, Weights


class BaseScorer(ABC):
    """One scorer with its weights loaded. Subclasses are named `Scorer`, one a file.

    Class attributes:
        label: the column's title, e.g. "PickScore".
        parts: what is loaded from where: part name to `Part`. The main part is named "model"; a
            user replaces it by `--weights SCORER=PATH`, any other by `--weights SCORER.PART=PATH`.
        view: PIL image to uint8 or int16 (3, H, W), once for all scorers that share the function.
    """

    label: ClassVar[str]
    parts: ClassVar[dict[str, Part]] = {}

    @staticmethod
    def view(image: Image.Image) -> Tensor:
        """An RGB image to uint8 or int16 (3, H, W), the same H and W for every image."""
        return clip_view(image)

    @abstractmethod
    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Load the weights, float32, to `device`.

        Raises:
            UserError: they are not to be had, or are not what they should be.
        """

    @abstractmethod
    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) of B images, their views (B, 3, H, W) on the scorer's device, and prompts.

        Called without gradients, under autocast where mixed precision is asked for; larger is
        better.

        Raises:
            UserError: a prompt that the scorer cannot judge.
        """


def frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """A module in float32 on `device`, in evaluation mode, without gradients."""
    return module.float().to(device).eval().requires_grad_(False)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the rows of two (B, D) tensors, (B,) float32."""
    a, b = a.float(), b.float()
    return (a / a.norm(dim=-1, keepdim=True) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)

"""What a scorer is: a view of an image, weights that it names, a number per image and prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from sdpo.common.errors import UserError
from sdpo.evaluation.score.views import CLIP_SIZE, clip_view
from sdpo.evaluation.score.weights import Part, Weights

Module = TypeVar("Module", bound=nn.Module)


class BaseScorer(ABC):
    """Scores images and prompts by weights that are loaded. Subclasses are named `Scorer`, one a
    file.

    Class attributes:
        label: the column's title, e.g. "PickScore".
        meaning: what the number says, where that is not known by the label.
        parts: what is loaded from where: part name to `Part`. The main part is named "model"; a
            user replaces it by `--weights SCORER=PATH`, any other by `--weights SCORER.PART=PATH`.
        view: PIL image to uint8 or int16 (3, H, W), once for all scorers that share the function.
    """

    label: ClassVar[str]
    meaning: ClassVar[str] = ""
    parts: ClassVar[dict[str, Part]] = {}

    @classmethod
    def needed(cls, weights: Weights) -> list[str]:
        """Name the parts that are loaded with these weights."""
        return list(cls.parts)

    @staticmethod
    def view(image: Image.Image) -> Tensor:
        """Make the view of an RGB image, uint8 or int16 (3, H, W), H and W the same for all."""
        return clip_view(image)

    @abstractmethod
    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Load the weights, float32, to `device`.

        Raises:
            UserError: they are not to be had, or are not what they should be.
        """

    @abstractmethod
    def score(self, views: Tensor, prompts: list[str]) -> Tensor:
        """Score B images by their prompts; larger is better.

        Called without gradients, under autocast where mixed precision is asked for.

        Args:
            views: (B, 3, H, W), on the scorer's device.
            prompts: B of them.

        Returns:
            (B,).

        Raises:
            UserError: a prompt that the scorer cannot judge.
        """


def frozen(module: Module, device: torch.device) -> Module:
    """Put a module on `device`, float32, in evaluation mode, without gradients."""
    return module.float().to(device).eval().requires_grad_(False)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Take the cosine between the rows of two (B, D) tensors, (B,) float32."""
    a, b = a.float(), b.float()
    return (a / a.norm(dim=-1, keepdim=True) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)


def check_size(size: int | None, where: str) -> None:
    """Refuse a model that takes images of another size than the views have.

    Raises:
        UserError: beginning with `where`.
    """
    if size != CLIP_SIZE:
        raise UserError(f"{where}: takes images of {size} px, not {CLIP_SIZE}")

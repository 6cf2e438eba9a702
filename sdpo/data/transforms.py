"""Turn RGB images into tensors; both images of a pair get the same flip and the same crop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdpo.common.images import resized_square
from sdpo.common.randomness import Key, uniform


@dataclass(frozen=True)
class PairTransform:
    """Resize the shorter side to `resolution`, crop to a square, flip; values in [-1, 1]."""

    resolution: int
    random_crop: bool = False
    hflip: bool = True

    def __call__(self, winner: Image.Image, loser: Image.Image, key: Key) -> tuple[Tensor, Tensor]:
        """Make two (3, R, R) float32 tensors of two RGB images.

        Where the images differ in shape, the crop is at the same relative place.
        """
        along, across = 0.5, 0.5
        if self.random_crop:
            along, across = uniform(*key, "crop-x"), uniform(*key, "crop-y")
        flip = self.flips(key)
        return self._one(winner, along, across, flip), self._one(loser, along, across, flip)

    def flips(self, key: Key) -> bool:
        """Tell whether the pair of this key is flipped."""
        return self.hflip and uniform(*key, "flip") < 0.5

    def centred(self, image: Image.Image) -> Tensor:
        """Make a tensor (3, R, R), float32, of an image cropped at the centre and not flipped.
        Flipping its last axis gives to the bit what flipping the image would have given."""
        return self._one(image, 0.5, 0.5, False)

    def _one(self, image: Image.Image, along: float, across: float, flip: bool) -> Tensor:
        r = self.resolution
        shorter = min(image.size)
        width, height = (max(r, round(side * r / shorter)) for side in image.size)
        corner = round((width - r) * along), round((height - r) * across)
        image = resized_square(image, (width, height), corner, r, Image.Resampling.BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1.0

"""Turn RGB images into tensors; both images of a pair get the same flip, crop and shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdpo.common.images import resized_crop
from sdpo.common.randomness import Key, uniform

Shape = tuple[int, int]  # width and height, in pixels


@dataclass(frozen=True)
class PairTransform:
    """Resize images to cover a shape, by default a square of side `resolution`, crop them to it,
    flip; values in [-1, 1]."""

    resolution: int
    random_crop: bool = False
    hflip: bool = True

    def __call__(
        self, winner: Image.Image, loser: Image.Image, key: Key, shape: Shape | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make two (3, height, width) float32 tensors of two RGB images.

        Where the images differ in shape, the crop is at the same relative place.
        """
        at, flip = self._crop(key), self.flips(key)
        return self._one(winner, at, flip, shape), self._one(loser, at, flip, shape)

    def told(self, size: Shape, key: Key, shape: Shape) -> list[int]:
        """Give what SDXL is told of an image of `size` that was cropped to `shape`: its height and
        width, the crop's top and left in the resized (and flipped) image, the shape's height and
        width."""
        (width, _), (left, top) = self._placed(size, shape, self._crop(key))
        if self.flips(key):
            left = width - shape[0] - left
        return [size[1], size[0], top, left, shape[1], shape[0]]

    def flips(self, key: Key) -> bool:
        """Tell whether the pair of this key is flipped."""
        return self.hflip and uniform(*key, "flip") < 0.5

    def centred(self, image: Image.Image, shape: Shape | None = None) -> Tensor:
        """Make a tensor (3, height, width), float32, of an image cropped at the centre and not
        flipped. Flipping its last axis gives to the bit what flipping the image would have given.
        """
        return self._one(image, (0.5, 0.5), False, shape)

    def _crop(self, key: Key) -> tuple[float, float]:
        """Tell where along and across the resized images the crop lies, 0 to 1."""
        return (
            (uniform(*key, "crop-x"), uniform(*key, "crop-y")) if self.random_crop else (0.5, 0.5)
        )

    def _placed(self, size: Shape, shape: Shape, at: tuple[float, float]) -> tuple[Shape, Shape]:
        """Tell the size that covers a shape, and the left upper corner of the crop in it."""
        # The side that is relatively shorter becomes the shape's, to the pixel.
        axis = 0 if size[0] * shape[1] <= size[1] * shape[0] else 1
        width, height = (
            max(least, round(side * shape[axis] / size[axis]))
            for side, least in zip(size, shape, strict=True)
        )
        return (width, height), (
            round((width - shape[0]) * at[0]),
            round((height - shape[1]) * at[1]),
        )

    def _one(
        self, image: Image.Image, at: tuple[float, float], flip: bool, shape: Shape | None
    ) -> Tensor:
        shape = shape or (self.resolution, self.resolution)
        size, corner = self._placed(image.size, shape, at)
        image = resized_crop(image, size, corner, shape, Image.Resampling.BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1.0

"""Turn image bytes into tensors; both images of a pair get the same flip and the same crop."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sdpo.common.randomness import Key, uniform


class UndecodableImage(Exception):
    """Say why an image cannot be read."""


def open_image(value: Any, base: Path | None = None) -> Image.Image:
    """Decode a dataset's image value to RGB.

    Args:
        value: encoded bytes, a {"bytes", "path"} dict as `datasets` gives, a path, or a PIL image.
        base: what relative paths are relative to.

    Raises:
        UndecodableImage: missing or broken.
    """
    try:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray | memoryview):
            return Image.open(io.BytesIO(value)).convert("RGB")
        if isinstance(value, str):
            path = Path(value)
            with Image.open(base / path if base else path) as image:
                return image.convert("RGB")
        if isinstance(value, Image.Image):
            return value.convert("RGB")
    # Pillow's own text would name the buffer by its address in memory.
    except UnidentifiedImageError:
        raise UndecodableImage("not in a known image format") from None
    # Decoders raise almost anything on broken files (SyntaxError and struct.error among them).
    except Exception as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from None
    raise UndecodableImage(f"no image there (found {type(value).__name__})")


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
        if shorter != r:
            width, height = (max(r, round(side * r / shorter)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left = round((image.width - r) * along)
        top = round((image.height - r) * across)
        image = image.crop((left, top, left + r, top + r))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1.0

"""From an image file to what scorers take: decoded once, resized as their own packages do.

Views have 8 bits a value where the package resizes 8-bit images, so that nothing is lost, and 16
where it resizes floats; a suite of views fits in memory.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from sdpo.common.images import resized_crop

CLIP_SIZE = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Steps of a view in 16 bits: [-2, 2) in steps of 6e-5, room for the overshoot of bicubic resizing.
FIXED_POINT = 2**14


def as_tensor(image: Image.Image) -> Tensor:
    """Turn an image into RGB, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def clip_view(image: Image.Image) -> Tensor:
    """View an image as CLIP and BLIP do, uint8 (3, 224, 224): shorter side to 224 px (bicubic,
    antialiased), centre crop."""
    shorter = min(image.size)
    # As torchvision rounds, to whose resizing and cropping this is equal.
    width, height = (int(CLIP_SIZE * side / shorter) for side in image.size)
    corner = round((width - CLIP_SIZE) / 2), round((height - CLIP_SIZE) / 2)
    bicubic = Image.Resampling.BICUBIC
    return as_tensor(resized_crop(image, (width, height), corner, (CLIP_SIZE, CLIP_SIZE), bicubic))


def whole_pixels(image: Image.Image) -> Tensor:
    """Resize as the package hpsv2: longer side to 224 px, black bars beside the rest, no crop.

    It resizes floats (bicubic, antialiased, not clamped): float32 (3, 224, 224), about 0 to 1.
    """
    pixels = as_tensor(image).float() / 255
    scale = CLIP_SIZE / max(pixels.shape[1:])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
    bicubic = F.InterpolationMode.BICUBIC
    pixels = F.resize(pixels, [height, width], interpolation=bicubic, antialias=True)
    top, left = (CLIP_SIZE - height) // 2, (CLIP_SIZE - width) // 2
    return F.pad(pixels, [left, top, CLIP_SIZE - width - left, CLIP_SIZE - height - top])


def whole_view(image: Image.Image) -> Tensor:
    """View an image by `whole_pixels`, int16 (3, 224, 224) in steps of 1 / FIXED_POINT."""
    return (whole_pixels(image) * FIXED_POINT).round().to(torch.int16)


def clip_pixels(views: Tensor) -> Tensor:
    """Turn views (B, 3, H, W), uint8 or int16 in steps of 1 / FIXED_POINT, into float32 with CLIP's
    mean and standard deviation removed."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=views.device).view(2, 3, 1, 1)
    pixels = views.float() / (FIXED_POINT if views.dtype == torch.int16 else 255)
    return (pixels - mean) / std

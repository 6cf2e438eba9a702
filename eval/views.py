"""From an image file to what scorers take: decoded once, resized as their own packages do.

Views are uint8: resizing happens on 8-bit images in all of the packages, so nothing is lost, and a
suite of views fits in memory.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

CLIP_SIZE = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def clip_view(image: Image.Image) -> Tensor:
    """CLIP's and BLIP's: shorter side to 224 px (bicubic, antialiased), centre crop; (3, 224, 224)."""
    image = F.resize(image, CLIP_SIZE, interpolation=F.InterpolationMode.BICUBIC)
    return as_tensor(F.center_crop(image, CLIP_SIZE))


def clip_pixels(views: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 with CLIP's mean and standard deviation removed."""
    mean = torch.tensor(CLIP_MEAN, device=views.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=views.device).view(3, 1, 1)
    return (views.float() / 255 - mean) / std

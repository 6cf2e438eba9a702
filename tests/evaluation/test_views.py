"""Views of images for scorers: those of torchvision, and of a strip no more than is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from sdpo.evaluation.score.views import CLIP_SIZE, as_tensor, clip_view

SIZES = [(512, 512), (224, 224), (64, 64), (1024, 768), (333, 250), (225, 224), (17, 251), (1, 1)]


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_torchvision(image):
    resized = F.resize(image, CLIP_SIZE, interpolation=F.InterpolationMode.BICUBIC)
    return as_tensor(F.center_crop(resized, CLIP_SIZE))


@pytest.mark.parametrize("size", SIZES)
def test_clip_sees_what_torchvision_makes_to_the_bit(size):
    for image in (picture(*size), picture(*size[::-1])):
        assert torch.equal(clip_view(image), by_torchvision(image))


@pytest.mark.parametrize("size", [(20, 801), (801, 20)])
def test_of_a_strip_it_sees_the_same_but_for_rounding(size):
    image = picture(*size)
    difference = (clip_view(image).int() - by_torchvision(image).int()).abs().float()
    assert difference.max() <= 16
    assert difference.mean() < 0.5

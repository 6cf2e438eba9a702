"""The transform that both images of a pair share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdpo.common.randomness import uniform
from sdpo.data.transforms import PairTransform

KEYS = [(0, 0, i) for i in range(60)]


def picture(width=96, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_pixels(tensor):
    """Back to (H, W, 3) uint8."""
    return ((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 200), (31, 17), (500, 64)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_shape_and_range(size, random_crop):
    one, other = PairTransform(64, random_crop)(picture(*size), picture(*size, seed=1), KEYS[0])
    for pixels in (one, other):
        assert pixels.shape == (3, 64, 64)
        assert pixels.dtype == torch.float32
        assert pixels.min() >= -1
        assert pixels.max() <= 1
    assert one.min() < -0.5 < 0.5 < one.max()


def test_black_is_minus_one_and_white_is_one():
    black, white = Image.new("RGB", (8, 8), (0, 0, 0)), Image.new("RGB", (8, 8), (255, 255, 255))
    one, other = PairTransform(8)(black, white, KEYS[0])
    assert torch.equal(one, torch.full((3, 8, 8), -1.0))
    assert torch.equal(other, torch.ones(3, 8, 8))


def test_centre_crop_without_flip():
    image = picture(96, 64)
    pixels, _ = PairTransform(64, hflip=False)(image, image, KEYS[0])
    assert np.array_equal(as_pixels(pixels), np.asarray(image)[:, 16:80])
    tall = picture(64, 96)
    pixels, _ = PairTransform(64, hflip=False)(tall, tall, KEYS[0])
    assert np.array_equal(as_pixels(pixels), np.asarray(tall)[16:80])


def test_resize_keeps_the_aspect():
    # Half red, half blue: after resizing to a quarter and cropping, the border stays central.
    image = Image.new("RGB", (512, 256), (255, 0, 0))
    image.paste((0, 0, 255), (256, 0, 512, 256))
    pixels, _ = PairTransform(64, hflip=False)(image, image, KEYS[0])
    assert (as_pixels(pixels)[:, :30] == (255, 0, 0)).all()
    assert (as_pixels(pixels)[:, 34:] == (0, 0, 255)).all()


@pytest.mark.parametrize("random_crop", [False, True])
def test_both_images_get_the_same_flip_and_crop(random_crop):
    image = picture(96, 80)
    transform = PairTransform(32, random_crop)
    results = [transform(image, image, key) for key in KEYS]
    assert all(torch.equal(one, other) for one, other in results)
    again = [transform(image, image, key) for key in KEYS]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(results, again, strict=True))
    kinds = {one.numpy().tobytes() for one, _ in results}
    assert len(kinds) > 8 if random_crop else len(kinds) == 2


def test_flip_is_drawn_about_half_the_time_and_can_be_left_out():
    image = picture(64, 64)
    plain = as_pixels(PairTransform(64, hflip=False)(image, image, KEYS[0])[0])
    found = [as_pixels(PairTransform(64)(image, image, key)[0]) for key in KEYS]
    flipped = [np.array_equal(pixels, plain[:, ::-1]) for pixels in found]
    assert all(f or np.array_equal(p, plain) for f, p in zip(flipped, found, strict=True))
    assert 15 <= sum(flipped) <= 45


def test_random_crops_reach_both_edges():
    image = picture(40, 32)
    whole = np.asarray(image)
    starts = set()
    for i in range(300):
        pixels, _ = PairTransform(32, True, hflip=False)(image, image, (0, 0, i))
        found = [x for x in range(9) if np.array_equal(as_pixels(pixels), whole[:, x : x + 32])]
        assert len(found) == 1
        starts.add(found[0])
    assert starts == set(range(9))


def test_images_of_different_shapes_are_cropped_at_the_same_relative_place():
    # A horizontal ramp: what is left of it says where it was cropped.
    def ramp(width):
        return Image.fromarray(
            np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (64, width, 3)).astype("u1")
        )

    transform = PairTransform(64, True, hflip=False)
    for key in KEYS[:20]:
        narrow, wide = transform(ramp(128), ramp(320), key)
        # Share of the free room left of the crop, 64 of 128 and 256 of 320 columns.
        a = float((narrow[0, 0, 0] + 1) / 2 * 127 / 64)
        b = float((wide[0, 0, 0] + 1) / 2 * 319 / 256)
        assert a == pytest.approx(b, abs=0.03)


SIZES = [(64, 64), (1, 1), (1024, 1024), (768, 1344), (1920, 1080), (333, 250), (31, 17), (640, 41)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("random_crop", [False, True])
def test_pixels_are_to_the_bit_those_of_version_0_1_0(size, random_crop):
    """Which resized the whole and cropped then; the key of the latent cache stands for it."""
    for r, key in ((64, KEYS[0]), (41, KEYS[1])):
        transform = PairTransform(r, random_crop)
        along, across = (uniform(*key, f"crop-{a}") if random_crop else 0.5 for a in "xy")
        for image, found in zip(
            (picture(*size), picture(*size[::-1], seed=1)),
            transform(picture(*size), picture(*size[::-1], seed=1), key),
            strict=True,
        ):
            width, height = (max(r, round(side * r / min(size))) for side in image.size)
            if min(size) != r:
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = round((width - r) * along), round((height - r) * across)
            pixels = np.asarray(image.crop((left, top, left + r, top + r)), np.float32)
            if transform.flips(key):
                pixels = pixels[:, ::-1]
            wanted = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1.0
            assert torch.equal(found, wanted)

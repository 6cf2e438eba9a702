"""Exact oracle of the tiny world: reads the attributes of an image back and scores a caption.

It measures instead of learning: background by the nearest palette colour of most border pixels,
objects as connected regions unlike the background, colours by the nearest palette entry, shapes by
the rendered template of equal area and centroid that fits best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from sdpo.tinyworld import world

# Regions smaller than this many pixels are noise: the smallest object of a scene covers 116.
_MIN_AREA = 30
# A pixel belongs to an object when it is this far (RGB distance, of 441) from the background seen;
# the closest object and background, purple on brown, are 151 apart before any washing-out.
_OBJECT_DISTANCE = 60.0
# Root mean square error, in units of the full range, at which `clean` has fallen to 1/e.
_CLEAN_SCALE = 0.15

_OBJECT_NAMES = tuple(world.OBJECT_COLOURS)
_OBJECT_RGB = np.asarray(list(world.OBJECT_COLOURS.values()), dtype=np.float32)
_BACKGROUND_NAMES = tuple(world.BACKGROUND_COLOURS)
_BACKGROUND_RGB = np.asarray(list(world.BACKGROUND_COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Reading:
    """What an image shows: a background name and the objects found, largest first.

    ``objects`` may be empty or hold more than two; ``clean`` in [0, 1] is the closeness of the
    image to the ideal rendering of just this background and these objects.
    """

    background: str
    objects: tuple[world.SceneObject, ...]
    clean: float


@dataclass(frozen=True)
class OracleScore:
    """``follows``: share of the caption's attributes present; ``clean``: see ``Reading``;
    ``score``: their product. All in [0, 1]."""

    follows: float
    clean: float
    score: float


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"expected a PIL image or uint8 (H, W, 3) pixels, got {image.dtype} {image.shape}"
        )
    size = (world.IMAGE_SIZE, world.IMAGE_SIZE)
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    return image.astype(np.float32)


def _nearest(rgb: np.ndarray, palette: np.ndarray) -> int:
    return int(((palette - rgb) ** 2).sum(axis=1).argmin())


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the background and its colour as seen: the median of the border pixels that vote
    for the winning name."""
    border = np.concatenate((pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]), axis=None)
    border = border.reshape(-1, 3)
    distances = ((border[:, None] - _BACKGROUND_RGB) ** 2).sum(axis=2)
    votes = distances.argmin(axis=1)
    winner = int(np.bincount(votes, minlength=len(_BACKGROUND_NAMES)).argmax())
    return _BACKGROUND_NAMES[winner], np.median(border[votes == winner], axis=0)


def connected_regions(mask: np.ndarray) -> np.ndarray:
    """Label the 4-connected regions of a boolean (H, W) mask: int array, 0 outside, 1.. inside."""
    labels: np.ndarray = ndimage.label(mask)[0]
    return labels


def _erode(mask: np.ndarray) -> np.ndarray:
    # Nothing is taken off at the image's edge.
    eroded: np.ndarray = ndimage.binary_erosion(mask, border_value=1)
    return eroded


_NOMINAL_AREA = {
    shape: float(world.coverage(shape, 32.0, 32.0, 16.0).sum()) / 16.0**2 for shape in world.SHAPES
}


def _fit_shape(alpha: np.ndarray) -> tuple[str, float, float, float]:
    """Shape, centroid x, y and radius whose coverage is nearest to ``alpha`` (64, 64)."""
    area = float(alpha.sum())
    centres = np.arange(world.IMAGE_SIZE, dtype=np.float32) + 0.5
    x = float((alpha.sum(axis=0) * centres).sum()) / area
    y = float((alpha.sum(axis=1) * centres).sum()) / area
    best: tuple[float, str, float] | None = None
    for shape in world.SHAPES:
        radius = math.sqrt(area / _NOMINAL_AREA[shape])
        misfit = float(np.abs(world.coverage(shape, x, y, radius) - alpha).sum())
        if best is None or misfit < best[0]:
            best = (misfit, shape, radius)
    assert best is not None
    return best[1], x, y, best[2]


def read(image: Image.Image | np.ndarray) -> Reading:
    """Read background and objects off an RGB image (PIL, or uint8 of shape (H, W, 3)).

    Other sizes than 64 x 64 are resized first.

    Raises:
        ValueError: on any other array.
    """
    pixels = _as_pixels(image)
    background, seen = _background(pixels)
    distance = np.sqrt(((pixels - seen) ** 2).sum(axis=2))
    # Opening removes single noisy pixels; a region keeps its extent by growing back afterwards.
    labels = connected_regions(ndimage.binary_dilation(_erode(distance > _OBJECT_DISTANCE)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    objects = []
    ideal = np.empty_like(pixels)
    ideal[:] = world.BACKGROUND_COLOURS[background]
    for label in np.argsort(-areas, kind="stable"):
        if areas[label] < _MIN_AREA:
            break
        region = labels == label
        core = _erode(region)
        core = core if core.any() else region
        rgb = np.median(pixels[core], axis=0)
        # Where a pixel lies between the background and the object's own colour, both as seen.
        direction = rgb - seen
        alpha = np.clip((pixels - seen) @ direction / float(direction @ direction), 0.0, 1.0)
        alpha *= ndimage.binary_dilation(region, iterations=2)
        shape, x, y, radius = _fit_shape(alpha)
        colour = _OBJECT_NAMES[_nearest(rgb, _OBJECT_RGB)]
        objects.append(world.SceneObject(colour, shape, x, y, radius))
        cover = world.coverage(shape, x, y, radius)[..., None]
        ideal += cover * (np.asarray(world.OBJECT_COLOURS[colour], dtype=np.float32) - ideal)
    rms = float(np.sqrt(np.mean((pixels - ideal) ** 2))) / 255.0
    return Reading(background, tuple(objects), math.exp(-rms / _CLEAN_SCALE))


def follows(reading: Reading, description: world.Description) -> float:
    """Tell the share of a caption's attributes that a reading shows, in [0, 1].

    One object: background, colour, shape, position. Two: background, both colours, both shapes and
    their relation. Objects are matched to the caption's in the best way. Every object that the
    caption does not mention counts as one more attribute, a missed one.
    """
    wanted = description.objects
    found = reading.objects[:4]
    total = 2 + 2 * len(wanted) + max(0, len(reading.objects) - len(wanted))
    hits = int(reading.background == description.background)
    best = 0
    if len(wanted) == 1:
        for item in found:
            placed = world.position_name(item.x, item.y) == description.placement
            best = max(best, _matches(item, wanted[0]) + int(placed))
    else:
        slots: list[world.SceneObject | None] = [*found, None]
        for i, first in enumerate(slots):
            for j, second in enumerate(slots):
                if i == j:
                    continue
                count = _matches(first, wanted[0]) + _matches(second, wanted[1])
                if first is not None and second is not None:
                    relation = world.relation_name(first.x, first.y, second.x, second.y)
                    count += int(relation == description.placement)
                best = max(best, count)
    return (hits + best) / total


def _matches(item: world.SceneObject | None, look: tuple[str, str]) -> int:
    return 0 if item is None else int(item.colour == look[0]) + int(item.shape == look[1])


def score(image: Image.Image | np.ndarray, caption: str) -> OracleScore:
    """Score an image for a caption of this world.

    Raises:
        ValueError: the text is no such caption, or the array no image.
    """
    description = world.parse_caption(caption)
    reading = read(image)
    share = follows(reading, description)
    return OracleScore(share, reading.clean, share * reading.clean)


def mean_score(images: Sequence[Image.Image | np.ndarray], captions: Sequence[str]) -> OracleScore:
    """Average each score over images and their captions.

    Raises:
        ValueError: unless there are equally many, and some.
    """
    if len(images) != len(captions) or not captions:
        raise ValueError(f"got {len(images)} images for {len(captions)} captions")
    scores = [score(image, text) for image, text in zip(images, captions, strict=True)]
    columns = zip(*((s.follows, s.clean, s.score) for s in scores), strict=True)
    return OracleScore(*(sum(column) / len(scores) for column in columns))


def chance_level(captions: Sequence[str], seed: int = 0, images_per_caption: int = 8) -> float:
    """Average ``follows`` of captions against clean images of unrelated random scenes.

    It is what a model that ignores its prompt but draws perfectly would reach.
    """
    rng = np.random.default_rng(seed)
    total = 0.0
    for text in captions:
        description = world.parse_caption(text)
        for _ in range(images_per_caption):
            reading = read(world.render_array(world.sample_scene(rng)))
            total += follows(reading, description)
    return total / (len(captions) * images_per_caption)

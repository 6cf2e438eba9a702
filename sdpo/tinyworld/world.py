"""Captioned scenes of one or two plain shapes on a plain background.

The vocabulary is closed: 6 object colours, 3 shapes, 4 backgrounds, 5 positions, 4 relations.
What a caption says is derived from a scene's geometry, so the two cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
from PIL import Image, ImageFilter

IMAGE_SIZE = 64

# Far apart from one another, so that the nearest palette entry still is the right one after a VAE
# round trip or a mild degradation.
OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 165, 60),
    "blue": (40, 75, 225),
    "yellow": (245, 215, 40),
    "purple": (155, 50, 185),
    "cyan": (50, 205, 220),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "brown": (120, 75, 40),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
POSITIONS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right", "center")
RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")

_CENTRE = IMAGE_SIZE / 2
# A lone object's centroid this close to the image centre on both axes counts as "center".
_CENTER_HALF_WIDTH = 6.0
_SUPERSAMPLING = 4
_SQUARE_HALF_SIDE = 0.886  # of the radius: as much area as the circle
_TRIANGLE_CIRCUMRADIUS = 1.35  # of the radius
_WASH_GREY = 150.0


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``x``, ``y`` is its centroid and ``radius`` its nominal size, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        if self.colour not in OBJECT_COLOURS:
            raise ValueError(f"unknown object colour {self.colour!r}")
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}")


@dataclass(frozen=True)
class Scene:
    """A background and one or two objects; the first object is the caption's subject."""

    background: str
    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUND_COLOURS:
            raise ValueError(f"unknown background {self.background!r}")
        if len(self.objects) not in (1, 2):
            raise ValueError(f"a scene has one or two objects, not {len(self.objects)}")


@dataclass(frozen=True)
class Description:
    """What a caption says: ``objects`` are (colour, shape); ``placement`` is a position for one
    object and the relation of the first to the second for two."""

    background: str
    objects: tuple[tuple[str, str], ...]
    placement: str

    @property
    def text(self) -> str:
        """Say it as a caption."""
        nouns = [f"a {colour} {shape}" for colour, shape in self.objects]
        if len(nouns) == 1:
            return f"{nouns[0]} at the {self.placement} on a {self.background} background"
        return f"{nouns[0]} {self.placement} {nouns[1]} on a {self.background} background"


def position_name(x: float, y: float) -> str:
    """Name the position of a lone object's centroid, given in pixels."""
    if max(abs(x - _CENTRE), abs(y - _CENTRE)) < _CENTER_HALF_WIDTH:
        return "center"
    return f"{'top' if y < _CENTRE else 'bottom'} {'left' if x < _CENTRE else 'right'}"


def relation_name(x: float, y: float, other_x: float, other_y: float) -> str:
    """Name the relation of the first centroid to the other, on the axis where they differ most."""
    dx, dy = other_x - x, other_y - y
    if abs(dy) >= abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def describe(scene: Scene) -> Description:
    """Read the attributes off a scene, as its caption states them."""
    first = scene.objects[0]
    if len(scene.objects) == 1:
        placement = position_name(first.x, first.y)
    else:
        other = scene.objects[1]
        placement = relation_name(first.x, first.y, other.x, other.y)
    return Description(
        scene.background, tuple((o.colour, o.shape) for o in scene.objects), placement
    )


def caption(scene: Scene) -> str:
    """Caption a scene, e.g. ``a red circle at the top left on a white background``."""
    return describe(scene).text


_NOUN = rf"a ({'|'.join(OBJECT_COLOURS)}) ({'|'.join(SHAPES)})"
_GROUND = rf"on a ({'|'.join(BACKGROUND_COLOURS)}) background"
_LONE = re.compile(rf"{_NOUN} at the ({'|'.join(POSITIONS)}) {_GROUND}")
_PAIR = re.compile(rf"{_NOUN} ({'|'.join(RELATIONS)}) {_NOUN} {_GROUND}")


def parse_caption(text: str) -> Description:
    """Invert ``Description.text``; case and white space do not matter.

    Raises:
        ValueError: the text is no caption of this world.
    """
    words = " ".join(text.lower().split())
    if match := _LONE.fullmatch(words):
        colour, shape, placement, background = match.groups()
        return Description(background, ((colour, shape),), placement)
    if match := _PAIR.fullmatch(words):
        colour, shape, placement, other_colour, other_shape, background = match.groups()
        return Description(background, ((colour, shape), (other_colour, other_shape)), placement)
    raise ValueError(f"not a caption of the tiny world: {text!r}")


def vocabulary() -> tuple[str, ...]:
    """List all words that occur in captions, sorted."""
    texts = ["a at the on background", *OBJECT_COLOURS, *BACKGROUND_COLOURS]
    texts += [*SHAPES, *POSITIONS, *RELATIONS]
    return tuple(sorted({word for text in texts for word in text.split()}))


def _choice(rng: np.random.Generator, names: Iterable[str]) -> str:
    options = tuple(names)
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, two_objects_share: float = 0.5) -> Scene:
    """Draw a scene; with probability ``two_objects_share`` it has two, never equal, objects."""
    background = _choice(rng, BACKGROUND_COLOURS)
    looks = list(product(OBJECT_COLOURS, SHAPES))
    if rng.random() >= two_objects_share:
        colour, shape = looks[int(rng.integers(len(looks)))]
        position = _choice(rng, POSITIONS)
        dx = {"left": -12.0, "right": 12.0}.get(position.split()[-1], 0.0)
        dy = {"top": -12.0, "bottom": 12.0}.get(position.split()[0], 0.0)
        jitter = rng.uniform(-3.0, 3.0, size=2)
        radius = float(rng.uniform(8.0, 12.0))
        x, y = _CENTRE + dx + float(jitter[0]), _CENTRE + dy + float(jitter[1])
        return Scene(background, (SceneObject(colour, shape, x, y, radius),))

    first, second = (looks[int(i)] for i in rng.choice(len(looks), size=2, replace=False))
    relation = _choice(rng, RELATIONS)
    sign = -1.0 if relation in ("above", "left of") else 1.0
    # Objects at least 26 px apart and at most 9 px in radius: a gap of some 5 px always remains,
    # so blur does not join them.
    objects = []
    for (colour, shape), side in ((first, sign), (second, -sign)):
        along = _CENTRE + side * float(rng.uniform(13.0, 15.0))
        across = _CENTRE + float(rng.uniform(-5.0, 5.0))
        x, y = (across, along) if relation in ("above", "below") else (along, across)
        objects.append(SceneObject(colour, shape, x, y, float(rng.uniform(7.0, 9.0))))
    return Scene(background, tuple(objects))


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Compute the share of each pixel that a shape covers: float32, (64, 64), in [0, 1].

    Sampled on a 4 x 4 grid within each pixel, which is the antialiasing.
    """
    reach = 1.5 * radius + 1.0
    left, right = (int(np.clip(v, 0, IMAGE_SIZE)) for v in (x - reach, x + reach + 1.0))
    top, bottom = (int(np.clip(v, 0, IMAGE_SIZE)) for v in (y - reach, y + reach + 1.0))
    out = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    height, width = bottom - top, right - left
    if height <= 0 or width <= 0:
        return out
    offset = 0.5 / _SUPERSAMPLING
    dx = (left + offset - x + np.arange(width * _SUPERSAMPLING) / _SUPERSAMPLING)[None, :]
    dy = (top + offset - y + np.arange(height * _SUPERSAMPLING) / _SUPERSAMPLING)[:, None]
    if shape == "circle":
        inside = dx**2 + dy**2 <= radius**2
    elif shape == "square":
        half = _SQUARE_HALF_SIDE * radius
        inside = (np.abs(dx) <= half) & (np.abs(dy) <= half)
    elif shape == "triangle":
        circumradius = _TRIANGLE_CIRCUMRADIUS * radius
        inside = (dy <= circumradius / 2) & (np.sqrt(3.0) * np.abs(dx) <= dy + circumradius)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    cells = inside.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING)
    out[top:bottom, left:right] = cells.mean(axis=(1, 3), dtype=np.float32)
    return out


def render_array(scene: Scene) -> np.ndarray:
    """Render a scene, antialiased: uint8, (64, 64, 3)."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = BACKGROUND_COLOURS[scene.background]
    for item in scene.objects:
        alpha = coverage(item.shape, item.x, item.y, item.radius)[..., None]
        canvas += alpha * (np.asarray(OBJECT_COLOURS[item.colour], dtype=np.float32) - canvas)
    return np.round(canvas).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """Render a scene, antialiased: RGB, 64 x 64."""
    return Image.fromarray(render_array(scene))


def degrade(image: Image.Image, rng: np.random.Generator, strength: float = 1.0) -> Image.Image:
    """Blur, wash out and add noise to an RGB image; what it shows stays readable.

    ``strength`` scales all three: 1 blurs by 0.6 to 1.3 px, mixes in 12 to 28% grey and adds noise
    of 6 to 16 grey levels standard deviation; 0 changes nothing.

    Raises:
        ValueError: below 0.
    """
    if strength < 0:
        raise ValueError(f"degradation strength must not be negative, got {strength}")
    blur = strength * rng.uniform(0.6, 1.3)
    wash = min(1.0, strength * rng.uniform(0.12, 0.28))
    noise = strength * rng.uniform(6.0, 16.0)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)
    pixels = pixels + wash * (_WASH_GREY - pixels)
    pixels = pixels + noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def wrong_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change one attribute of a scene (background, a colour or a shape), geometry equal."""
    pick = int(rng.integers(1 + 2 * len(scene.objects)))
    if pick == 0:
        others = [name for name in BACKGROUND_COLOURS if name != scene.background]
        return replace(scene, background=_choice(rng, others))
    index, item = (pick - 1) // 2, scene.objects[(pick - 1) // 2]
    if pick % 2:
        others = [name for name in OBJECT_COLOURS if name != item.colour]
        changed = replace(item, colour=_choice(rng, others))
    else:
        others = [name for name in SHAPES if name != item.shape]
        changed = replace(item, shape=_choice(rng, others))
    objects = tuple(changed if i == index else o for i, o in enumerate(scene.objects))
    return replace(scene, objects=objects)


def all_descriptions() -> list[Description]:
    """List every description the world can show, in a fixed order (5256 of them)."""
    looks = list(product(OBJECT_COLOURS, SHAPES))
    lone = product(BACKGROUND_COLOURS, ((look,) for look in looks), POSITIONS)
    pairs = product(BACKGROUND_COLOURS, permutations(looks, 2), RELATIONS)
    return [Description(*parts) for parts in (*lone, *pairs)]


def evaluation_prompts(n: int, seed: int = 0) -> list[str]:
    """Draw ``n`` different captions, half with one object and half with two, the same for a seed.

    Raises:
        ValueError: ``n`` is below 1 or more than twice the number of one-object captions.
    """
    everything = all_descriptions()
    lone = [d.text for d in everything if len(d.objects) == 1]
    pairs = [d.text for d in everything if len(d.objects) == 2]
    if not 1 <= n <= 2 * len(lone):
        raise ValueError(f"number of prompts must be from 1 to {2 * len(lone)}, got {n}")
    rng = np.random.default_rng(seed)
    chosen = [lone[int(i)] for i in rng.choice(len(lone), size=n // 2, replace=False)]
    chosen += [pairs[int(i)] for i in rng.choice(len(pairs), size=n - n // 2, replace=False)]
    return [chosen[int(i)] for i in rng.permutation(n)]

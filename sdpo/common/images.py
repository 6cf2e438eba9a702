"""Decode an image of any kind to upright RGB, and resize it without making more than is kept."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Resampling, Transpose

# To be changed with what pixels are made of a file: what is kept of images on disk names it.
READING = "upright by EXIF, transparency over white, deep grey scaled"

# Longer strips than 16 : 1 are cut before they are resized.
LONGEST = 16

_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# What Pillow makes 8 bits of while it leaves the key colour of PNG's tRNS as it stands in the file.
_KEY_TO_8_BITS = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}
_SIXTEEN_BITS, _TWELVE_BITS = 2**16 - 1, 2**12 - 1
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# What makes an image upright, by EXIF's orientation.
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ON_ITS_SIDE = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]
T = TypeVar("T")


class UndecodableImage(Exception):
    """Say why an image cannot be read."""


class MissingImage(UndecodableImage):
    """Say where an image's file is not."""


def open_image(value: Any, base: Path | None = None) -> Image.Image:
    """Decode a dataset's image value to RGB; see `as_rgb`.

    Args:
        value: encoded bytes, a {"bytes", "path"} dict as `datasets` gives, a path, or a PIL image.
        base: what relative paths are relative to.

    Raises:
        UndecodableImage: missing, broken, too large, or of pixels whose meaning is not known.
    """
    return _opened(value, base, as_rgb)


def image_size(value: Any, base: Path | None = None) -> tuple[int, int]:
    """Read from an image's header the width and height that `open_image` gives it.

    Args:
        value, base: see `open_image`; or a file of encoded bytes.

    Raises:
        UndecodableImage: missing, or without a header that can be read.
    """
    return _opened(value, base, _upright_size)


def _opened(value: Any, base: Path | None, use: Callable[[Image.Image], T]) -> T:
    try:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray | memoryview):
            return use(Image.open(io.BytesIO(value)))
        if isinstance(value, str):
            path = Path(value)
            with Image.open(base / path if base else path) as image:
                return use(image)
        if isinstance(value, Image.Image):
            return use(value)
        if hasattr(value, "read"):
            return use(Image.open(value))
    except UndecodableImage:
        raise
    except FileNotFoundError as error:
        raise MissingImage(f"there is no file {error.filename}") from None
    # Pillow's own text would name the buffer by its address in memory.
    except UnidentifiedImageError:
        raise UndecodableImage("not in a known image format") from None
    except Image.DecompressionBombError:
        bound = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UndecodableImage(f"more pixels than the {bound} that are decoded") from None
    # Decoders raise almost anything on broken files (SyntaxError and struct.error among them).
    except Exception as error:
        raise UndecodableImage(f"{type(error).__name__}: {error}") from None
    raise UndecodableImage(f"no image there (found {type(value).__name__})")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to RGB, 8 bits: as its EXIF orientation says, transparent
    pixels over white, deeper grey scaled. Of several frames it is the one that is open.

    Raises:
        UndecodableImage: it has no pixels, or it cannot be known which of their values is white.
    """
    if 0 in image.size:
        raise UndecodableImage(f"without pixels ({image.width} x {image.height})")
    scale = _key_scale(image)
    image.load()
    key, turn = image.info.get("transparency"), _turn(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, key)
    elif key is not None and scale != 1:
        parts = [int(part * scale) for part in (key if isinstance(key, tuple) else [key])]
        image.info["transparency"] = tuple(parts) if len(parts) > 1 else parts[0]
    see_through = "transparency" in image.info or image.mode in _WITH_ALPHA
    if see_through or (image.palette and image.palette.mode == "RGBA"):
        # Pillow knows no way from La to RGBA.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, (0, 0), image)
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if 0 in image.size:
        raise UndecodableImage(f"without pixels ({image.width} x {image.height})")
    if (
        image.format == "TIFF"
        and getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation, 1) > 4
    ):
        return as_rgb(image).size  # versions of Pillow differ in when they turn it
    return image.size[::-1] if _turn(image, loaded=False) in _ON_ITS_SIDE else image.size


def _key_scale(image: Image.Image) -> float:
    """Say by what a PNG's transparent key is to be multiplied; only before it is loaded."""
    tiles = getattr(image, "tile", None)
    raw_mode = tiles[0][3] if tiles and image.format == "PNG" else None
    return _KEY_TO_8_BITS.get(raw_mode, 1) if isinstance(raw_mode, str) else 1


def _turn(image: Image.Image, loaded: bool = True) -> Transpose | None:
    """Read from EXIF how an image is to be turned."""
    if image.format == "TIFF":
        return None  # Pillow has turned it, and some versions leave the tag as it was
    try:
        # Of a PNG that is not loaded, what stands before its pixels; its own method would load it.
        exif = image.getexif() if loaded else Image.Image.getexif(image)
        return _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:
        # The pixels are whole, and a broken block of EXIF says nothing about them.
        return None


def _eight_bits(image: Image.Image, key: Any) -> Image.Image:
    """Scale grey of integers or floats to L, or to LA where some value is the transparent one."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    grey = (values * np.float32(255 / _white(image, values)) + np.float32(0.5)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow minds it in 8 bits alone
        grey = 255 - grey
    found = Image.fromarray(grey)
    if isinstance(key, int):
        found.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return found


def _white(image: Image.Image, values: np.ndarray) -> float:
    """Tell which value of integer or float grey is white."""
    low, high = values.min().item(), values.max().item()
    if image.mode == "F":
        if low >= 0 and high <= 1:  # not for NaN
            return 1.0
        raise UndecodableImage(
            f"float pixels from {low:g} to {high:g}; save it with 0 as black and 1 as white, or in "
            "8 bits"
        )
    if getattr(image, "tag_v2", {}).get(_TIFF_BITS) == (12,):
        return _TWELVE_BITS
    # Pillow's "I" is 16 bits in these two, and in others as many as the file happens to have.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        if low < 0 or high > _SIXTEEN_BITS:
            raise UndecodableImage(
                f"integer pixels from {low} to {high}; save it in 8 or 16 bits without a sign"
            )
        return 255 if high <= 255 else _SIXTEEN_BITS
    return _SIXTEEN_BITS


def resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    corner: tuple[int, int],
    shape: tuple[int, int],
    resample: Resampling,
) -> Image.Image:
    """Resize an image to `size`, (width, height), and cut out of that a rectangle of `shape`,
    likewise, whose left upper corner is at `corner`.

    The memory it takes does not grow with the length of a strip: what is longer than `LONGEST`
    rectangles is cut out first, which is the same but for the rounding of the place.
    """
    (left, top), (width, height) = corner, size
    box = (left, top, left + shape[0], top + shape[1])
    if image.size == size:
        return image.crop(box)
    if width <= LONGEST * shape[0] and height <= LONGEST * shape[1]:
        return image.resize(size, resample).crop(box)
    x0, x1 = (x * image.width / width for x in box[::2])
    y0, y1 = (y * image.height / height for y in box[1::2])
    # The filter reaches at most two pixels of the coarser of the two images beyond the box.
    margin = math.ceil(3 * max(1, min(image.width / shape[0], image.height / shape[1])))
    first_x, first_y = max(0, int(x0) - margin), max(0, int(y0) - margin)
    last_x = min(image.width, math.ceil(x1) + margin)
    last_y = min(image.height, math.ceil(y1) + margin)
    near = image.crop((first_x, first_y, last_x, last_y))
    # Pillow keeps the box in float32, which is exact enough only near its image's corner.
    place = (x0 - first_x, y0 - first_y, x1 - first_x, y1 - first_y)
    return near.resize(shape, resample, box=place)

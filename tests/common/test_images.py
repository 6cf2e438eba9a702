"""Decoding: every mode that Pillow has, alpha, orientation; resizing no more than is kept."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdpo.common.images import (
    LONGEST,
    UndecodableImage,
    as_rgb,
    image_size,
    open_image,
    resized_crop,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP_RAMP = RAMP.astype(np.uint16) * 257  # the same greys in 16 bits


def picture(width=96, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def to_bytes(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


def as_grey(value):
    """The one channel of a decoded image whose three are equal."""
    found = open_image(value)
    assert found.mode == "RGB"
    pixels = np.asarray(found)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def pixels_of(value):
    return np.asarray(open_image(value)).reshape(-1, 3).tolist()


def png(bits, colour, rows, key=b"", size=(2, 1)):
    """A PNG of which Pillow writes no like: `rows` each begin with filter 0."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    if key:
        parts.insert(1, chunk(b"tRNS", key))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_tag(tiff, tag, value):
    """A little-endian TIFF with another value of one tag."""
    data = bytearray(tiff)
    (where,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, where)
    places = [where + 2 + 12 * i for i in range(count)]
    (entry,) = (p for p in places if struct.unpack_from("<H", data, p)[0] == tag)
    struct.pack_into("<HH", data, entry + 8, value, 0)
    return bytes(data)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB", "YCbCr", "HSV", "RGBX"])
def test_modes_without_alpha_become_rgb(mode):
    image = picture(16, 16).convert(mode)
    assert np.array_equal(np.asarray(open_image(image)), np.asarray(image.convert("RGB")))
    fmt = {"L": "PNG", "1": "PNG", "P": "PNG", "RGB": "PNG"}.get(mode, "TIFF")
    # No format keeps the first two, and Pillow 10.0 refuses the file that it writes of the third.
    if mode not in ("HSV", "RGBX", "YCbCr"):
        found = open_image(to_bytes(image, fmt))
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_lab():
    colour = Image.new("RGB", (4, 4), (200, 30, 90))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.buildTransform(*profiles, "RGB", "LAB").apply(colour)
    for value in (lab, to_bytes(lab, "TIFF")):
        assert np.abs(np.subtract(pixels_of(value), (200, 30, 90))).max() <= 4  # LAB in 8 bits


@pytest.mark.parametrize(
    ("mode", "order"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")]
)
def test_16_bit_grey_is_scaled_in_every_byte_order(mode, order):
    image = Image.frombytes(mode, (16, 16), DEEP_RAMP.astype(order).tobytes())
    assert np.array_equal(as_grey(image), RAMP)
    if mode in ("I;16", "I;16B"):
        assert np.array_equal(as_grey(to_bytes(image, "TIFF")), RAMP)


@pytest.mark.parametrize(("fmt", "options"), [("PNG", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_16_bit_files(fmt, options):
    image = Image.frombytes("I;16", (16, 16), DEEP_RAMP.astype("<u2").tobytes())
    assert np.array_equal(as_grey(to_bytes(image, fmt, **options)), RAMP)
    # A dark picture is not mistaken for one of 8 bits.
    dark = Image.frombytes("I;16", (16, 16), RAMP.astype("<u2").tobytes())
    assert as_grey(to_bytes(dark, fmt, **options)).max() == 1


def test_16_bit_grey_rounds_to_the_nearest():
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16)
    image = Image.frombytes("I;16", (8, 1), values.astype("<u2").tobytes())
    assert as_grey(image)[0].tolist() == [0, 0, 1, 1, 2, 254, 255, 255]


def test_integers_of_16_or_8_bits_range():
    assert np.array_equal(as_grey(Image.fromarray(DEEP_RAMP.astype(np.int32))), RAMP)
    assert np.array_equal(
        as_grey(to_bytes(Image.fromarray(DEEP_RAMP.astype(np.int32)), "PPM")), RAMP
    )
    assert np.array_equal(
        as_grey(to_bytes(Image.fromarray(DEEP_RAMP.astype(np.int32)), "TIFF")), RAMP
    )
    assert np.array_equal(as_grey(Image.fromarray(RAMP.astype(np.int32))), RAMP)
    # PGM says what is white: 1000 here, where most is dark.
    assert as_grey(b"P5 2 1 1000\n" + struct.pack(">2H", 1, 1000))[0].tolist() == [0, 255]


def test_tiffs_of_12_bits_and_of_white_as_zero():
    tiff = to_bytes(Image.frombytes("I;16", (16, 16), DEEP_RAMP.astype("<u2").tobytes()), "TIFF")
    assert np.array_equal(as_grey(with_tag(tiff, 262, 0)), 255 - RAMP)
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00]) * 64  # 4095, 0, 2048, 0
    twelve = with_tag(tiff[: -len(DEEP_RAMP.tobytes())] + packed + b"\0" * 128, 258, 12)
    assert as_grey(twelve)[0, :4].tolist() == [255, 0, 128, 0]


def test_floats_are_of_0_to_1():
    image = Image.fromarray(RAMP.astype(np.float32) / 255)
    assert np.array_equal(as_grey(image), RAMP)
    assert np.array_equal(as_grey(to_bytes(image, "TIFF")), RAMP)


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        (np.float32, 1.5, "float pixels from 0 to 1.5; save it with 0 as black and 1 as white"),
        (np.float32, -0.5, "float pixels from -0.5 to 0"),
        (np.float32, float("nan"), "float pixels from nan"),
        (np.int32, -1, "integer pixels from -1 to 0; save it in 8 or 16 bits"),
        (np.int32, 65536, "integer pixels from 0 to 65536"),
    ],
)
def test_pixels_whose_white_is_unknown_are_refused(kind, value, reason):
    pixels = np.zeros((4, 4), kind)
    pixels[1, 2] = value
    for image in (Image.fromarray(pixels), to_bytes(Image.fromarray(pixels), "TIFF")):
        with pytest.raises(UndecodableImage, match=reason):
            open_image(image)


def test_transparency_is_seen_over_white():
    colours = [(10, 20, 30, 255), (10, 20, 30, 0), (10, 20, 30, 102)]
    image = Image.new("RGBA", (3, 1))
    image.putdata(colours)
    wanted = [[10, 20, 30], [255, 255, 255], [157, 161, 165]]
    assert pixels_of(image) == wanted
    for fmt in ("PNG", "TIFF"):
        assert pixels_of(to_bytes(image, fmt)) == wanted
    assert np.abs(np.subtract(pixels_of(image.convert("RGBa")), wanted)).max() <= 1
    grey = Image.merge("LA", (Image.new("L", (3, 1), 100), image.getchannel("A")))
    wanted = [[100] * 3, [255] * 3, [193] * 3]
    assert pixels_of(grey) == pixels_of(to_bytes(grey)) == wanted
    assert np.abs(np.subtract(pixels_of(grey.convert("La")), wanted)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_opaque_alpha_changes_nothing(mode):
    image = picture(16, 16).convert("L" if mode != "RGBA" else "RGB").convert(mode)
    assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


def test_palettes_with_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 99, 199])
    image.putpixel((1, 0), 1)
    assert pixels_of(to_bytes(image)) == [[0, 0, 0], [9, 99, 199]]
    for fmt in ("PNG", "GIF"):
        assert pixels_of(to_bytes(image, fmt, transparency=1)) == [[0, 0, 0], [255, 255, 255]]
    assert pixels_of(to_bytes(image, transparency=b"\xff\x66")) == [[0, 0, 0], [157, 193, 233]]
    with_alpha = image.convert("PA")
    with_alpha.putalpha(Image.new("L", (2, 1), 0))
    assert with_alpha.mode == "PA"
    assert pixels_of(with_alpha) == [[255, 255, 255]] * 2


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "wanted"),
    [
        (1, 0, b"\x40", (0,), [[255] * 3, [255] * 3]),
        (2, 0, b"\xd0", (3,), [[255] * 3, [85] * 3]),
        (2, 0, b"\xd0", (1,), [[255] * 3, [255] * 3]),
        (4, 0, b"\x37", (3,), [[255] * 3, [119] * 3]),
        (8, 0, b"\x07\x08", (7,), [[255] * 3, [8] * 3]),
        (16, 0, struct.pack(">2H", 300, 301), (300,), [[255] * 3, [1] * 3]),
        (8, 2, b"\1\2\3\1\2\4", (1, 2, 3), [[255] * 3, [1, 2, 4]]),
        (16, 2, struct.pack(">6H", 300, 5000, 60000, 300, 5000, 50000), (300, 5000, 60000),
         [[255] * 3, [1, 19, 195]]),
    ],
)  # fmt: skip
def test_the_transparent_colour_of_a_png_at_every_depth(bits, colour, row, key, wanted):
    data = png(bits, colour, b"\0" + row, struct.pack(f">{len(key)}H", *key))
    assert pixels_of(data) == wanted


TURNED = {  # of [[1, 2, 3], [4, 5, 6]]
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
    0: [[1, 2, 3], [4, 5, 6]],
    77: [[1, 2, 3], [4, 5, 6]],
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "16-bit PNG"])
def test_exif_orientation(orientation, fmt):
    grey = np.array([[1, 2, 3], [4, 5, 6]], np.uint8) * 40
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(grey)
    if fmt == "16-bit PNG":
        image = Image.frombytes("I;16", (3, 2), (grey.astype("<u2") * 257).tobytes())
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = to_bytes(image, fmt.split()[-1], exif=exif, **options)
    assert (as_grey(data) // 40).tolist() == TURNED[orientation]


def test_a_photo_that_was_taken_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    found = np.asarray(open_image(to_bytes(image, "JPEG", exif=exif)))
    assert found.shape == (64, 32, 3)
    assert found[:28].min() > 250
    assert found[36:].max() < 5


def test_broken_exif_does_not_matter():
    image = picture(8, 8)
    data = to_bytes(image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(image))


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first(fmt):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = to_bytes(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(frames[0]))


def test_every_way_in_which_an_image_is_given(tmp_path):
    image = picture(16, 16)
    data, path = to_bytes(image), tmp_path / "sub" / "a.png"
    path.parent.mkdir()
    path.write_bytes(data)
    ways = [
        (data, None),
        (bytearray(data), None),
        (memoryview(data), None),
        ({"bytes": data, "path": None}, None),
        ({"bytes": data, "path": "gone.png"}, tmp_path),
        ({"bytes": None, "path": str(path)}, None),
        ({"bytes": None, "path": "sub/a.png"}, tmp_path),
        (str(path), None),
        (str(path), tmp_path / "elsewhere"),
        ("sub/a.png", tmp_path),
        (image, None),
    ]
    for value, base in ways:
        assert np.array_equal(np.asarray(open_image(value, base)), np.asarray(image))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "not in a known image format"),
        (b"garbage", "not in a known image format"),
        (None, "found NoneType"),
        ({"bytes": None, "path": None}, "found NoneType"),
        ("gone.png", "there is no file .*gone.png"),
        (7, "found int"),
        (Image.new("RGB", (0, 5)), r"without pixels \(0 x 5\)"),
        (png(8, 0, b"", size=(0, 1)), "."),
        (png(8, 0, b"", size=(20000, 20000)), "more pixels than the 178956970 that are decoded"),
    ],
)
def test_what_is_no_image_says_why(value, reason, tmp_path):
    with pytest.raises(UndecodableImage, match=reason):
        open_image(value, tmp_path)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "GIF", "BMP"])
def test_a_truncated_file_is_undecodable(fmt):
    data = to_bytes(picture(64, 64), fmt)
    with pytest.raises(UndecodableImage):
        open_image(data[: len(data) // 2])


@pytest.mark.parametrize("size", [(64, 1300), (1300, 64), (3, 100), (100, 3), (200, 7000), (1, 40)])
@pytest.mark.parametrize("place", [0.0, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_a_strip_is_cut_first_with_the_same_result(size, place, resample):
    image, side = picture(*size), 48
    shorter = min(size)
    large = tuple(max(side, round(length * side / shorter)) for length in size)
    assert max(large) > LONGEST * side
    corner = tuple(round((length - side) * place) for length in large)
    found = np.asarray(resized_crop(image, large, corner, (side, side), resample)).astype(int)
    box = (*corner, corner[0] + side, corner[1] + side)
    wanted = np.asarray(image.resize(large, resample).crop(box)).astype(int)
    # Pillow orders its two passes by the sizes; between them it rounds, and clips what overshoots.
    assert np.abs(found - wanted).max() <= 16
    assert np.abs(found - wanted).mean() < 0.5


MEASURE = """
import sys
from PIL import Image
from sdpo.data.transforms import PairTransform
from sdpo.evaluation.score.views import clip_view, whole_view

def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

for size in ((16, 16), (32, 16)):
    clip_view(Image.new("RGB", size)), whole_view(Image.new("RGB", size))
PairTransform(1024)(Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16)), (0, 0, 0))
before = peak()
for size in ((2, 4000), (4000, 2), (1, 30000), (30000, 1), (1, 999_999), (999_999, 1)):
    image = Image.new("RGB", size, (255, 0, 0))
    for random_crop in (False, True):
        pixels, _ = PairTransform(1024, random_crop)(image, image, (0, 0, 0))
        assert pixels.shape == (3, 1024, 1024)
        assert (pixels[0] == 1).all() and (pixels[1:] == -1).all()
    view = clip_view(image)
    assert view.shape == (3, 224, 224) and (view[0] == 255).all() and not view[1:].any()
    assert whole_view(image).shape == (3, 224, 224)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of memory")
def test_memory_does_not_grow_with_the_length_of_a_strip():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A square of 1024 px is 12 MB in float32, a picture of a million pixels 4 MB in Pillow; what
    # torch and the allocator keep of them hangs on their versions. Resized whole, the smallest of
    # these strips takes 2500.
    assert float(done.stdout) < 250


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
def test_the_size_is_read_from_the_header(fmt, orientation, tmp_path):
    image, options = picture(30, 20), {}
    if orientation:
        exif = Image.Exif()
        exif[274] = orientation
        options["exif"] = exif.tobytes()
    data = to_bytes(image, fmt, **(options if fmt not in ("GIF", "BMP") else {}))
    (tmp_path / "x").write_bytes(data)
    turned = (orientation or 1) > 4 and fmt not in ("GIF", "BMP")
    for value in (data, {"bytes": data, "path": None}, str(tmp_path / "x"), io.BytesIO(data)):
        assert image_size(value) == ((20, 30) if turned else (30, 20))
    assert image_size("x", tmp_path) == open_image(data).size
    if fmt not in ("TIFF", "WEBP"):
        # Of the pixels nothing is needed.
        assert image_size(data[: len(data) - 40]) == open_image(data).size


@pytest.mark.parametrize("value", [b"", b"GIF89a", None, "/nowhere/x.png", b"not an image", 3])
def test_what_has_no_header_has_no_size(value):
    with pytest.raises(UndecodableImage):
        image_size(value)

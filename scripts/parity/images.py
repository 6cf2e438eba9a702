"""The images that the parity fixtures are about: tests/evaluation/fixtures/parity/images/.

    python scripts/parity/images.py

Kept as files, since encoders differ between versions. Sizes are those of generated images, odd
ones, both orientations, smaller and larger than what models take; one is grey.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sdpo.tinyworld import world

REPO = Path(__file__).resolve().parents[2]
DIRECTORY = REPO / "tests" / "evaluation" / "fixtures" / "parity" / "images"
# File name, width, height, strength of the noise (which PNG cannot compress).
IMAGES = (
    ("square.jpg", 512, 512, 6.0),
    ("large.jpg", 1024, 1024, 4.0),
    ("wide.jpg", 640, 360, 6.0),
    ("tall.png", 301, 467, 0.0),
    ("exact.png", 224, 224, 0.0),
    ("small.png", 97, 61, 20.0),
    ("grey.png", 150, 200, 0.0),
)


def main() -> None:
    """Write all of them."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, (name, width, height, noise) in enumerate(IMAGES):
        scene = world.render(world.sample_scene(np.random.default_rng(number)))
        picture = scene.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture, np.float32)
        across = np.linspace(-40, 40, width)[None, :, None] * np.array([1.0, -0.5, 0.2])
        down = np.linspace(-30, 30, height)[:, None, None] * np.array([-0.3, 1.0, 0.6])
        pixels = pixels + across + down + noise * rng.standard_normal(pixels.shape)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if name.startswith("grey"):
            picture = picture.convert("L")
        picture.save(DIRECTORY / name, quality=80, optimize=True)


if __name__ == "__main__":
    main()

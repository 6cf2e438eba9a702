"""ImageReward and HPSv2 against the packages image-reward 1.5 and hpsv2 1.2.0.

What the packages made of the same weights, images and prompts was recorded by
`bash scripts/parity/run.sh` in fixtures/parity/{imagereward,hpsv2}.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.parity.small_scorers import (
    BlipSize,
    clip_shapes,
    imagereward_shapes,
    write_hpsv2,
    write_imagereward,
)
from sdpo.common.images import open_image
from sdpo.evaluation.score.base import BaseScorer
from sdpo.evaluation.score.scorers import get_scorer
from sdpo.evaluation.score.views import CLIP_MEAN, CLIP_STD, clip_pixels, clip_view, whole_pixels
from sdpo.evaluation.score.weights import Weights

FIXTURES = Path(__file__).parent / "fixtures" / "parity"
PROMPTS = json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))
IMAGES = sorted(path.name for path in (FIXTURES / "images").iterdir())
PACKAGES = ("imagereward", "hpsv2")
RECORDED = {
    package: json.loads((FIXTURES / f"{package}.json").read_text(encoding="utf-8"))
    for package in PACKAGES
}
# The same operations in the same order, in other libraries: rounding only.
TOLERANCE = 1e-5
ASKED = os.environ.get("SDPO_TRUE_SIZE") == "1"
MEMORY_GIB = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
TRUE_SIZES = [
    pytest.param(
        "imagereward",
        marks=pytest.mark.skipif(
            not (ASKED or MEMORY_GIB > 12),
            reason="takes 5 GB of a memory under 12 GB: SDPO_TRUE_SIZE=1 runs it anyway",
        ),
    ),
    pytest.param(
        "hpsv2",
        marks=pytest.mark.skipif(
            not ASKED, reason="takes a minute, 7 GB and 4 GB of disk: SDPO_TRUE_SIZE=1 runs it"
        ),
    ),
]


def blip_size(config: dict[str, Any]) -> BlipSize:
    """What a fixture's configuration describes; the published image encoder's size is the
    package's own."""
    med, vision = config["med_config"], config.get("vision", {"embed_dim": 1024, "depth": 24})
    return BlipSize(
        image_width=vision["embed_dim"],
        image_depth=vision["depth"],
        text_width=med["hidden_size"],
        text_depth=med["num_hidden_layers"],
        text_heads=med["num_attention_heads"],
    )


def load(package: str, size: str, directory: Path) -> BaseScorer:
    """The scorer with the weights that the package had."""
    config = RECORDED[package][size]["config"]
    if package == "imagereward":
        given = write_imagereward(directory, blip_size(config))
    else:
        given = write_hpsv2(directory, config)
    cls = get_scorer(package)
    parts = {key.partition(".")[2] or "model": path for key, path in given.items()}
    return cls(Weights(package, cls.parts, parts), torch.device("cpu"))


def largest_difference(scorer: BaseScorer, recorded: dict[str, Any]) -> float:
    """Between a scorer's and the package's scores, over all that the package scored."""
    largest = 0.0
    for name, expected in recorded["scores"].items():
        view = scorer.view(open_image(str(FIXTURES / "images" / name)))
        with torch.no_grad():
            scores = scorer.score(
                view.expand(len(expected), *view.shape), [PROMPTS[int(n)] for n in expected]
            )
        assert scores.shape == (len(expected),)
        largest = max(largest, np.abs(scores.numpy() - list(expected.values())).max())
    return largest


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, BaseScorer]:
    """Both scorers, small."""
    return {p: load(p, "small", tmp_path_factory.mktemp(p)) for p in PACKAGES}


@pytest.mark.parametrize("size", ["small", "true"])
def test_the_packages_have_the_weights_that_the_tests_write(size):
    shapes = imagereward_shapes(blip_size(RECORDED["imagereward"][size]["config"]))
    assert digest(shapes) == RECORDED["imagereward"][size]["weights_sha256"]
    shapes = clip_shapes(RECORDED["hpsv2"][size]["config"])
    assert digest(shapes) == RECORDED["hpsv2"][size]["weights_sha256"]
    assert RECORDED["hpsv2"][size]["unused"] == []


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Of names and shapes, as scripts/parity/oracle.py makes it."""
    lines = "".join(f"{name} {list(shapes[name])}\n" for name in sorted(shapes))
    return hashlib.sha256(lines.encode()).hexdigest()


def test_the_true_size_is_the_published_one():
    blip = blip_size(RECORDED["imagereward"]["true"]["config"])
    assert blip == BlipSize(1024, 24, 768, 12, 12)
    assert RECORDED["hpsv2"]["true"]["config"]["vision_cfg"]["width"] == 1280
    assert RECORDED["hpsv2"]["true"]["config"]["vision_cfg"]["layers"] == 32
    assert RECORDED["imagereward"]["versions"]["image-reward"] == "1.5"
    assert RECORDED["hpsv2"]["versions"]["hpsv2"] == "1.2.0"


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_tokens_are_equal(small, number):
    tokens = small["imagereward"].tokens([PROMPTS[number]])
    expected = RECORDED["imagereward"]["tokens"][number]
    assert tokens.input_ids.tolist() == [expected]
    assert tokens.attention_mask.tolist() == [[int(token != 0) for token in expected]]
    assert small["hpsv2"].tokens([PROMPTS[number]]).tolist() == [
        RECORDED["hpsv2"]["tokens"][number]
    ]


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_equal(name):
    image = open_image(str(FIXTURES / "images" / name))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    made = {
        "imagereward": clip_pixels(clip_view(image)[None])[0],
        "hpsv2": (whole_pixels(image) - mean) / std,
    }
    for package, pixels in made.items():
        recorded = RECORDED[package]["pixels"][name]
        some = pixels[:, ::37, ::37].flatten().numpy()
        assert pixels.shape == (3, 224, 224)
        assert np.abs(some - recorded["every_37th"]).max() < 1e-6
        assert pixels.double().mean().item() == pytest.approx(recorded["mean"], abs=1e-6)
    # To the bit where only whole numbers are resized; JPEG decoders are allowed to differ.
    if name.endswith(".png"):
        found = hashlib.sha256(made["imagereward"].numpy().tobytes()).hexdigest()
        assert found == RECORDED["imagereward"]["pixels"][name]["sha256"]


@pytest.mark.parametrize("package", PACKAGES)
def test_scores_are_equal(small, package):
    recorded = RECORDED[package]["small"]
    assert list(recorded["scores"]) == IMAGES
    scores = np.array([list(row.values()) for row in recorded["scores"].values()])
    assert scores.shape == (len(IMAGES), len(PROMPTS))
    # Every image and every prompt counts, or equality would say little.
    assert scores.std(0).min() > 100 * TOLERANCE
    assert scores.std(1).min() > 100 * TOLERANCE
    largest = largest_difference(small[package], recorded)
    print(f"{package}, small: largest difference {largest:.2g}, scores vary by {scores.std():.2g}")
    assert largest < TOLERANCE


@pytest.mark.parametrize("package", TRUE_SIZES)
def test_scores_are_equal_at_true_size(package, tmp_path):
    try:
        scorer = load(package, "true", tmp_path)
        recorded = RECORDED[package]["true"]
        largest = largest_difference(scorer, recorded)
        spread = np.std([v for row in recorded["scores"].values() for v in row.values()])
        print(f"{package}, true size: largest difference {largest:.2g}, vary by {spread:.2g}")
        assert largest < TOLERANCE
    finally:
        shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep for three runs

"""Scores, tokens and pixels of image-reward 1.5 and hpsv2 1.2.0, by the packages' own code, for the
images and prompts in tests/evaluation/fixtures/parity. Runs in the environment of run.sh only.

Weights are random (random_weights.py) and drawn again by the tests, so that fixtures hold no
weights. Nothing of the packages is changed; they are only kept from downloading: a tokenizer lies
where image-reward looks for it, and hpsv2 is handed its own model, untrained, in the place where it
keeps it once loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image

from scripts.parity.small_scorers import TRUE_BLIP, BlipSize, fill
from scripts.parity.vocabulary import write_vocabulary

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "evaluation" / "fixtures" / "parity"
COMMAND = "bash scripts/parity/run.sh"
LIBRARIES = ("transformers", "timm", "torch", "torchvision", "numpy", "pillow")
PACKAGES = ("image-reward", "hpsv2", *LIBRARIES)

# The second is of the published file's sizes.
SMALL_MED = BlipSize(text_width=96, text_depth=3, text_heads=4).med_config()
TRUE_MED = TRUE_BLIP.med_config()
SMALL_VIT = {"embed_dim": 128, "depth": 3, "num_heads": 2}
SMALL_CLIP = {
    "embed_dim": 48,
    "vision_cfg": {
        "image_size": 224,
        "layers": 3,
        "width": 160,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
# At true size an image takes seconds: each with one of the prompts.
TRUE_PAIRS = (("square.jpg", 0), ("tall.png", 1), ("wide.jpg", 4), ("small.png", 6))


def main() -> None:
    """Write imagereward.json and hpsv2.json, or the parts asked for."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    add = parser.add_argument
    both, sizes = ["imagereward", "hpsv2"], ["small", "true"]
    add("--packages", nargs="+", choices=both, default=both)
    add("--sizes", nargs="+", choices=sizes, default=sizes)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for package in args.packages:
        path = FIXTURES / f"{package}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found["made_by"] = COMMAND
        found["versions"] = {name: version(name) for name in PACKAGES}
        found["versions"]["python"] = platform.python_version()
        with tempfile.TemporaryDirectory() as scratch:
            measure = imagereward if package == "imagereward" else hpsv2
            found.update(measure(args.sizes, Path(scratch)))
        text = json.dumps(found, indent=1)
        # Lists of numbers on one line each.
        text = re.sub(r"\n\s+(?=-?\d)|(?<=\d)\n\s+(?=\])", " ", text)
        path.write_text(text + "\n", encoding="utf-8")


def imagereward(sizes: list[str], scratch: Path) -> dict[str, Any]:
    """Measure image-reward's tokens, pixels, and rewards by `ImageReward.score`."""
    write_vocabulary(scratch / "bert-base-uncased")
    os.chdir(scratch)  # image-reward loads "bert-base-uncased", which may be a directory
    found = {}
    for size in sizes:
        model, config = (small_imagereward if size == "small" else true_imagereward)(scratch)
        pairs = pairs_of(size)
        used = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        found[size] = {"config": config, **weights_of(model, used)}
        found[size]["scores"] = by_image(
            (i, p, model.score(prompts()[p], str(image(i)))) for i, p in pairs
        )
        if size == "small":
            found["tokens"] = model.blip.tokenizer(
                prompts(), padding="max_length", truncation=True, max_length=35
            ).input_ids
            found["pixels"] = pixels_of(model.preprocess)
    return found


def true_imagereward(scratch: Path) -> tuple[Any, dict[str, Any]]:
    """Build ViT-L/16 and BERT-base, written to a file and loaded by the package's own `load`."""
    import ImageReward

    med = scratch / "med_config.json"
    med.write_text(json.dumps(TRUE_MED))
    model = ImageReward.ImageReward(med_config=str(med), device="cpu")
    fill(model)
    torch.save(model.state_dict(), scratch / "ImageReward.pt")
    del model
    path = str(scratch / "ImageReward.pt")
    return ImageReward.load(path, device="cpu", med_config=str(med)), {"med_config": TRUE_MED}


def small_imagereward(scratch: Path) -> tuple[Any, dict[str, Any]]:
    """Build the package's model with its encoders and head, of the package's own classes, made
    smaller: it offers no smaller one itself."""
    import ImageReward
    from ImageReward.ImageReward import MLP
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    med = scratch / "med_config.json"
    med.write_text(json.dumps(SMALL_MED))
    model = ImageReward.ImageReward(med_config=str(med), device="cpu")
    model.blip.visual_encoder = VisionTransformer(img_size=224, patch_size=16, **SMALL_VIT)
    config = BertConfig.from_json_file(str(med))
    config.encoder_width = SMALL_VIT["embed_dim"]
    model.blip.text_encoder = BertModel(config=config, add_pooling_layer=False)
    model.mlp = MLP(config.hidden_size)
    fill(model)
    return model.eval(), {"med_config": SMALL_MED, "vision": SMALL_VIT}


def hpsv2(sizes: list[str], scratch: Path) -> dict[str, Any]:
    """Measure hpsv2's tokens, pixels, and scores by `hpsv2.img_score.score`."""
    os.environ["HPS_ROOT"] = str(scratch)
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    (scratch / "small.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(scratch / "small.json")
    found = {}
    for size in sizes:
        name = "small" if size == "small" else "ViT-H-14"
        # As in the package, but for the weights: those of the checkpoint replace them all anyway.
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, None, precision="amp", device="cpu", light_augmentation=True, output_dict=True
        )
        fill(model)
        checkpoint = scratch / f"{size}.pt"
        torch.save({"state_dict": model.state_dict()}, checkpoint)
        img_score.model_dict.update(model=model, preprocess_val=preprocess)
        pairs = pairs_of(size)
        found[size] = {"config": open_clip.get_model_config(name), **weights_of(model, ("",))}
        found[size]["scores"] = by_image(
            (i, p, float(img_score.score(str(image(i)), prompts()[p], cp=str(checkpoint))[0]))
            for i, p in pairs
        )
        checkpoint.unlink()
        if size == "small":
            found["tokens"] = open_clip.get_tokenizer("ViT-H-14")(prompts()).tolist()
            found["pixels"] = pixels_of(preprocess)
    return found


def prompts() -> list[str]:
    """Read the prompts of the fixtures."""
    return json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))


def image(name: str) -> Path:
    """Find an image of the fixtures."""
    return FIXTURES / "images" / name


def pairs_of(size: str) -> list[tuple[str, int]]:
    """List (image, prompt number) of everything that is scored."""
    if size == "true":
        return list(TRUE_PAIRS)
    names = sorted(path.name for path in (FIXTURES / "images").iterdir())
    return [(name, number) for name in names for number in range(len(prompts()))]


def by_image(scored: Iterable[tuple[str, int, float]]) -> dict[str, dict[int, float]]:
    """Sort scores by image and prompt number."""
    found: dict[str, dict[int, float]] = {}
    for name, number, score in scored:
        found.setdefault(name, {})[number] = score
    return found


def weights_of(model: torch.nn.Module, used: tuple[str, ...]) -> dict[str, Any]:
    """Digest the names and shapes of what decides the scores, and name the rest."""
    state = model.state_dict()
    needed = {k for k, v in state.items() if k.startswith(used) and v.is_floating_point()}
    lines = "".join(f"{name} {list(state[name].shape)}\n" for name in sorted(needed))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {"weights_sha256": digest, "unused": sorted(state.keys() - needed)}


def pixels_of(preprocess: Callable[[Image.Image], torch.Tensor]) -> dict[str, Any]:
    """Record what a package makes of each image: a digest of the floats, and some of them."""
    found = {}
    for path in sorted((FIXTURES / "images").iterdir()):
        pixels = preprocess(Image.open(path)).numpy()
        some = pixels[:, ::37, ::37].astype(np.float64)
        found[path.name] = {
            "sha256": hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
            "mean": pixels.mean(dtype=np.float64),
            "every_37th": [float(f"{value:.8g}") for value in some.ravel()],
        }
    return found


if __name__ == "__main__":
    main()

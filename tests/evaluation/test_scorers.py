"""PickScore, CLIP, Aesthetics and the oracle, against a second computation; discovery."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.parity.small_scorers import write_aesthetics, write_clip, write_pickscore
from sdpo.common.errors import UserError
from sdpo.evaluation.score.config import ScoreOptions
from sdpo.evaluation.score.scorers import PUBLISHED, SCORERS_DIR, get_scorer, scorer_names
from sdpo.tinyworld import oracle, world

CPU = torch.device("cpu")
PROMPTS = ["a red circle at the center", "", "Café — 3 dogs' dinner!!", "word " * 100]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def images():
    """Noise, and smooth pictures; square and not."""
    rng = np.random.default_rng(0)
    found = [Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))]
    for width, height in ((512, 512), (640, 333), (100, 257)):
        y, x = np.mgrid[0:height, 0:width]
        picture = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
        found.append(Image.fromarray(picture.astype(np.uint8)))
    return found


def load(name, weights):
    return get_scorer(name)(ScoreOptions(weights=weights).of(name, get_scorer(name)), CPU)


@torch.no_grad()
def scores(name, weights, images, prompts=PROMPTS):
    scorer = load(name, weights)
    return scorer.score(torch.stack([scorer.view(i) for i in images]), prompts)


def by_hand(image):
    """What CLIP's own preprocessing does to an image, with Pillow and numpy; (1, 3, 224, 224)."""
    width, height = image.size
    scale = 224 / min(width, height)
    size = (224, int(height * scale)) if width <= height else (int(width * scale), 224)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    pixels = (pixels - MEAN) / STD
    return torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)


@torch.no_grad()
def test_pickscore(images, tmp_path):
    """Against the logits of the whole CLIPModel, whose scale is taken off again."""
    from transformers import CLIPModel, CLIPTokenizer

    weights = write_pickscore(tmp_path / "p")
    model = CLIPModel.from_pretrained(tmp_path / "p")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "p")
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        logits = model(pixel_values=by_hand(image), **tokens).logits_per_image
        expected.append((logits / model.logit_scale.exp()).item())
    found = scores("pickscore", weights, images)
    assert np.abs(found.numpy() - expected).max() < 1e-5
    assert np.ptp(expected) > 0.01


@torch.no_grad()
def test_pickscore_reads_captions_as_the_slow_tokenizer(images, tmp_path):
    weights = write_pickscore(tmp_path / "p")
    scorer, view = (
        load("pickscore", weights),
        torch.stack([get_scorer("pickscore").view(images[0])]),
    )
    curly, straight = scorer.score(view, ["“red”，left"]), scorer.score(view, ['"red",left'])
    assert torch.equal(curly, straight)
    assert not torch.equal(curly, scorer.score(view, ["red left"]))


@torch.no_grad()
def test_clip(images, tmp_path):
    """Against a model and a preprocessing that open_clip itself builds from the same files."""
    import open_clip

    weights = write_clip(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "tiny-for-tests", pretrained=str(tmp_path / "c" / "open_clip_pytorch_model.bin")
    )
    tokenizer = open_clip.get_tokenizer("tiny-for-tests")
    model.eval()
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        seen = model.encode_image(preprocess(image)[None], normalize=True)
        read = model.encode_text(tokenizer([prompt]), normalize=True)
        expected.append((seen @ read.T).item())
    found = scores("clip", weights, images)
    assert np.abs(found.numpy() - expected).max() < 1e-5
    assert np.ptp(expected) > 0.01


def affine(state):
    """The head as one map in float64: (row, constant)."""
    row, constant = np.ones((1, 1)), np.zeros(1)
    for place in (7, 6, 4, 2, 0):
        constant = constant + row @ state[f"layers.{place}.bias"].double().numpy()
        row = row @ state[f"layers.{place}.weight"].double().numpy()
    return row[0], constant[0]


@torch.no_grad()
def test_aesthetics(images, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    weights = write_aesthetics(tmp_path / "a")
    tower = CLIPVisionModelWithProjection.from_pretrained(weights["aesthetics.clip"]).eval()
    row, constant = affine(torch.load(weights["aesthetics"], weights_only=True))
    expected = []
    for image in images:
        seen = tower(pixel_values=by_hand(image)).image_embeds[0].double().numpy()
        expected.append(row @ (seen / np.linalg.norm(seen)) + constant)
    found = scores("aesthetics", weights, images)
    assert np.abs(found.numpy() - expected).max() < 1e-5
    assert np.ptp(expected) > 1e-3
    assert torch.equal(found, scores("aesthetics", weights, images, ["other"] * 4))


@torch.no_grad()
def test_the_real_aesthetic_head(repo):
    """LAION's own weights: the hash written down, and the values of a second computation."""
    from sdpo.common.files import file_sha256
    from sdpo.evaluation.score.scorers.aesthetics import AestheticHead, Scorer
    from sdpo.evaluation.score.weights import load_exactly, read_tensors

    path = repo.parent / "shared" / "weights" / "sac+logos+ava1-l14-linearMSE.pth"
    if not path.is_file():
        pytest.skip(f"LAION's head is not at {path}")
    assert file_sha256(path) == Scorer.parts["model"].sha256
    assert path.name == Scorer.parts["model"].file
    state = read_tensors(path, "--weights aesthetics")
    head = AestheticHead()
    load_exactly(head, state, "--weights aesthetics")
    embeddings = torch.nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator()))
    row, constant = affine(state)
    expected = embeddings.double().numpy() @ row + constant
    found = head.eval()(embeddings).double().numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert np.ptp(expected) > 0.5


def test_oracle():
    rng = np.random.default_rng(3)
    scenes = [world.sample_scene(rng) for _ in range(4)]
    images = [world.render(scene) for scene in scenes]
    prompts = [world.caption(scene) for scene in scenes[:3]] + [world.caption(scenes[0])]
    found = scores("oracle", {}, images, prompts)
    expected = [oracle.score(i, p).score for i, p in zip(images, prompts, strict=True)]
    assert found.tolist() == pytest.approx(expected)
    assert found[:3].min() > 0.9 > found[3]
    large = [image.resize((256, 256), Image.Resampling.NEAREST) for image in images]
    assert torch.equal(scores("oracle", {}, large, prompts), found)
    with pytest.raises(UserError, match=r"oracle: not a caption.*prompts/tinyworld\.json"):
        scores("oracle", {}, images, ["a horse"] * 4)


@pytest.mark.parametrize("write", [write_pickscore, write_clip, write_aesthetics])
def test_batches_do_not_matter(write, images, tmp_path):
    weights = write(tmp_path / "w")
    name = next(iter(weights)).partition(".")[0]
    together = scores(name, weights, images)
    alone = torch.cat([scores(name, weights, [i], [p]) for i, p in zip(images, PROMPTS)])  # noqa: B905
    assert (together - alone).abs().max() < 1e-5


def test_a_scorer_is_one_file():
    assert set(PUBLISHED) < set(scorer_names())
    for name in scorer_names():
        tree = ast.parse((SCORERS_DIR / f"{name}.py").read_text())
        assert "Scorer" in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {get_scorer(name).label for name in PUBLISHED} == {
        "PickScore",
        "HPSv2",
        "Aesthetics",
        "CLIP",
        "ImageReward",
    }
    with pytest.raises(ValueError, match="unknown scorer 'mine'"):
        get_scorer("mine")


def test_one_new_file_adds_a_scorer(repo, images, tmp_path):
    """In a copy of the programs, without another line: known to --help, scored, summarised."""
    for package in ("sdpo", "eval"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repo / package, tmp_path / package, ignore=ignored)
    (tmp_path / SCORERS_DIR.relative_to(repo) / "brightness.py").write_text(
        "from sdpo.evaluation.score.base import BaseScorer\n\n\n"
        "class Scorer(BaseScorer):\n"
        "    label = 'Brightness'\n\n"
        "    def __init__(self, weights, device):\n        pass\n\n"
        "    def score(self, views, prompts):\n"
        "        return views.float().mean((1, 2, 3)) / 255\n"
    )
    (tmp_path / "m").mkdir()
    rows = []
    for i, image in enumerate(images):
        image.save(tmp_path / "m" / f"{i}.png")
        rows.append({"prompt": "x", "gen_image_path": f"m/{i}.png"})
    (tmp_path / "m.json").write_text(json.dumps(rows))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def score(*arguments):
        return subprocess.run(
            [sys.executable, "eval/score.py", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "brightness" in score("--help")
    assert "Brightness" in score("m.json", "--scorers", "brightness")
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    mean = np.mean([(by_hand(image).numpy()[0].T * STD + MEAN).mean() for image in images])
    assert row["mean"] == pytest.approx(mean, abs=1e-3)
    assert row["n"] == 4

"""HPSv2's loading, view and batching; that it equals the package is test_parity.py's matter."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.parity.small_scorers import SMALL_CLIP, write_hpsv2
from sdpo.common.errors import UserError
from sdpo.evaluation.score.scorers import get_scorer
from sdpo.evaluation.score.scorers.hpsv2 import Scorer
from sdpo.evaluation.score.views import FIXED_POINT, clip_view, whole_pixels, whole_view
from sdpo.evaluation.score.weights import Weights

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "", "a very long caption " * 40, "two cats on a chair"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the weights and what they are of."""
    path = tmp_path_factory.mktemp("hpsv2")
    write_hpsv2(path)
    return path


@pytest.fixture(scope="module")
def scorer(written):
    """Loaded from `written`."""
    return load(written)


@pytest.fixture(scope="module")
def views():
    """Four images, int16 (4, 3, 224, 224)."""
    rng = np.random.default_rng(0)
    sizes = ((512, 512), (300, 200), (64, 128), (224, 224))
    coarse = [Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)) for _ in sizes]
    return torch.stack([Scorer.view(i.resize(s)) for i, s in zip(coarse, sizes, strict=True)])


@pytest.fixture
def own(written, tmp_path):
    """A copy of `written` that a test may break."""
    return shutil.copytree(written, tmp_path / "own")


def load(path, name="hpsv2"):
    cls = get_scorer(name)
    return cls(Weights(name, cls.parts, {"model": str(path)}), CPU)


def change(path, edit):
    """Edit a file of weights."""
    held = torch.load(path / "HPS_v2_compressed.pt", weights_only=True)
    edit(held["state_dict"])
    torch.save(held, path / "HPS_v2_compressed.pt")


@torch.no_grad()
def test_an_image_and_its_prompt_score_the_same_in_any_batch_and_order(scorer, views):
    together = scorer.score(views, PROMPTS)
    assert together.shape == (4,) and together.dtype == torch.float32
    assert together.unique().numel() == 4 and together.abs().max() <= 1
    alone = torch.cat([scorer.score(v[None], [p]) for v, p in zip(views, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    reversed_ = scorer.score(views.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(reversed_.flip(0), together, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_file_does_as_well_as_a_directory(written, scorer, views):
    loaded = load(written / "HPS_v2_compressed.pt")
    assert torch.equal(loaded.score(views, PROMPTS), scorer.score(views, PROMPTS))


@torch.no_grad()
def test_the_logit_scale_plays_no_part(own, scorer, views):
    change(own, lambda state: state.update(logit_scale=torch.tensor(4.6)))
    assert torch.equal(load(own).score(views, PROMPTS), scorer.score(views, PROMPTS))


@torch.no_grad()
def test_version_2_1_is_a_column_of_its_own_with_weights_of_its_own(own, scorer, views):
    (own / "HPS_v2_compressed.pt").rename(own / "HPS_v2.1_compressed.pt")
    later = load(own, "hpsv21")
    assert torch.equal(later.score(views, PROMPTS), scorer.score(views, PROMPTS))
    assert (later.label, Scorer.label) == ("HPSv2.1", "HPSv2")
    with pytest.raises(UserError, match=r"--weights hpsv2: there is no file .*HPS_v2_compressed"):
        load(own)


def test_half_precision_weights_are_used_in_float32(own):
    change(own, lambda state: state.update({k: v.half() for k, v in state.items()}))
    model = load(own).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_without_a_configuration_it_is_the_published_architecture(own):
    (own / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"does not fit: Missing.*resblocks\.2\."):
        load(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not open_clip's"),
        ('{"model_cfg": {"embed_dim": 8}}', "needs a model_cfg with vision_cfg and text_cfg"),
        (json.dumps({"model_cfg": {**SMALL_CLIP, "depth": 3}}), "describes no CLIP"),
        (
            json.dumps({"model_cfg": {**SMALL_CLIP, "text_cfg": {"hf_model_name": "roberta"}}}),
            "has hf_model_name",
        ),
        (
            json.dumps({"model_cfg": {**SMALL_CLIP, "vision_cfg": {"image_size": 336}}}),
            "takes images of 336 px, not 224",
        ),
    ],
)
def test_a_configuration_that_does_not_do(own, text, message):
    (own / "open_clip_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load(own)


def test_weights_that_do_not_fit(own):
    where = rf"--weights hpsv2={own / 'HPS_v2_compressed.pt'} does not fit: "
    change(own, lambda state: state.update({"visual.proj": torch.zeros(80, 31)}))
    with pytest.raises(UserError, match=where + r"size mismatch for visual\.proj"):
        load(own)
    change(own, lambda state: state.pop("visual.proj"))
    with pytest.raises(UserError, match=where + r'Missing key\(s\).*"visual\.proj"'):
        load(own)
    change(
        own,
        lambda state: state.update({"visual.proj": torch.zeros(80, 32), "other": torch.ones(1)}),
    )
    with pytest.raises(UserError, match=where + r'Unexpected key\(s\).*"other"'):
        load(own)


def test_weights_that_are_not_finite(own):
    change(own, lambda state: state["visual.proj"].__setitem__((0, 0), float("nan")))
    with pytest.raises(UserError, match=r"--weights hpsv2=.* is broken: its weight visual\.proj"):
        load(own)


def test_files_that_are_not_hpsv2(own):
    path = own / "HPS_v2_compressed.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"hpsv2: cannot read weights from .*HPS_v2_compressed\.pt"):
        load(own)
    torch.save({"visual.proj": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"HPS_v2_compressed\.pt is not HPSv2's: no state_dict"):
        load(own)


def test_without_network_and_cache_the_message_names_the_file_and_the_flag(tmp_path):
    for name, file in (("hpsv2", "HPS_v2_compressed.pt"), ("hpsv21", "HPS_v2.1_compressed.pt")):
        cls = get_scorer(name)
        with pytest.raises(UserError, match=f"cannot get {file} .*--weights {name}=PATH"):
            cls(Weights(name, cls.parts, {}, str(tmp_path)), CPU)


def test_the_view_holds_the_whole_image_between_black_bars():
    wide = Image.new("RGB", (400, 101), (255, 128, 0))
    pixels = whole_pixels(wide)
    assert pixels.shape == (3, 224, 224)
    rows = pixels[0].amax(1) > 0.5
    assert rows.sum() == 57  # round(101 * 224 / 400)
    assert rows.nonzero().min() == 83 and pixels[:, ~rows].abs().max() == 0
    tall = whole_pixels(wide.rotate(90, expand=True))
    torch.testing.assert_close(tall, pixels.transpose(1, 2), atol=1e-5, rtol=0)


def test_the_view_keeps_what_8_bits_would_not():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(64, 192, (300, 300, 3), dtype=np.uint8))
    view, pixels = whole_view(image), whole_pixels(image)
    assert view.dtype == torch.int16
    assert (view / FIXED_POINT - pixels).abs().max() <= 0.51 / FIXED_POINT
    # The same picture as CLIP's where the image is square, but for rounding to 8 bits.
    assert 1e-3 < (clip_view(image) / 255 - pixels).abs().max() < 1e-2


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (1000, 1), (3, 2000)])
def test_the_view_of_extreme_images(size):
    view = whole_view(Image.new("RGB", size, (255, 255, 255)))
    assert view.shape == (3, 224, 224) and view.max() >= FIXED_POINT - 1

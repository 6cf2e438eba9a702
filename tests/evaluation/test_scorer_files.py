"""A scorer's own directory: weights or tokenizers that are missing or another's are refused, and
what is whole is taken, also where it lies in a larger model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.parity.small_scorers import write_aesthetics, write_imagereward, write_pickscore
from sdpo.common.errors import UserError
from sdpo.evaluation.score.config import ScoreOptions
from sdpo.evaluation.score.scorers import get_scorer


def load(name, weights):
    options = ScoreOptions(weights=weights)
    return get_scorer(name)(options.of(name, get_scorer(name)), torch.device("cpu"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(directory of PickScore's model, weights of the aesthetics scorer)."""
    root = tmp_path_factory.mktemp("scorers")
    write_pickscore(root / "p")
    return root / "p", write_aesthetics(root / "a")


def lacking(directory, tmp_path, part):
    path = tmp_path / "lacking"
    shutil.copytree(directory, path)
    state = load_file(path / "model.safetensors")
    kept = {name: value for name, value in state.items() if part not in name}
    assert len(kept) < len(state)
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.mark.parametrize("part", ["text_model.encoder.layers.1.", "visual_projection", "post_lay"])
def test_pickscore_without_some_weights_is_refused(written, tmp_path, part):
    with pytest.raises(UserError, match=r"^pickscore: .* weights are missing"):
        load("pickscore", {"pickscore": lacking(written[0], tmp_path, part)})


@pytest.mark.parametrize("part", ["visual_projection", "post_layernorm", "encoder.layers.0."])
def test_aesthetics_without_some_weights_is_refused(written, tmp_path, part):
    _, weights = written
    clip = lacking(weights["aesthetics.clip"], tmp_path, part)
    with pytest.raises(UserError, match=r"^aesthetics: .* weights are missing"):
        load("aesthetics", {**weights, "aesthetics.clip": clip})


def test_aesthetics_takes_a_whole_clip_as_the_published_one_is(written, tmp_path):
    """openai/clip-vit-large-patch14 holds a text encoder beside the image encoder."""
    directory, weights = written
    path = tmp_path / "whole"
    shutil.copytree(directory, path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["projection_dim"] = config["projection_dim"]
    (path / "config.json").write_text(json.dumps(config))
    scorer = load("aesthetics", {**weights, "aesthetics.clip": str(path)})
    held = load_file(path / "model.safetensors")["visual_projection.weight"]
    assert torch.equal(scorer.clip.visual_projection.weight, held)


@pytest.mark.parametrize("kind", ["bert", "tiny"])
def test_another_models_tokenizer_is_refused(written, tmp_path, kind):
    if kind == "bert":
        from transformers import BertTokenizer

        place = write_imagereward(tmp_path / "i")["imagereward.tokenizer"]
        BertTokenizer.from_pretrained(place).save_pretrained(tmp_path / "t")
    else:
        from sdpo.tinyworld.architecture import build_tokenizer

        build_tokenizer().save_pretrained(tmp_path / "t")
    weights = {"pickscore": str(written[0]), "pickscore.processor": str(tmp_path / "t")}
    with pytest.raises(UserError, match=r"--weights pickscore\.processor: .* is not the tokenizer"):
        load("pickscore", weights)


@pytest.mark.parametrize("gone", [("merges.txt",), ("vocab.json",), ("vocab.json", "merges.txt")])
def test_a_tokenizer_that_is_not_whole_is_refused(written, tmp_path, gone):
    path = tmp_path / "p"
    shutil.copytree(written[0], path)
    for name in ("tokenizer.json", *gone):
        (path / name).unlink()
    with pytest.raises(UserError, match=r"^pickscore: cannot load"):
        load("pickscore", {"pickscore": str(path)})


def test_a_broken_tokenizer_is_refused(written, tmp_path):
    path = tmp_path / "p"
    shutil.copytree(written[0], path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^pickscore: cannot load"):
        load("pickscore", {"pickscore": str(path)})

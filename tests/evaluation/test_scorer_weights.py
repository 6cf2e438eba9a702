"""Where a scorer's weights come from: overrides, the hub's cache, hashes, identity."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch

from scripts.parity.small_scorers import write_all
from sdpo.common.errors import UserError
from sdpo.evaluation.score.config import ScoreOptions
from sdpo.evaluation.score.scorers import PUBLISHED
from sdpo.evaluation.score.scoring import fetch_weights
from sdpo.evaluation.score.weights import (
    TOKENIZER_FILES,
    Part,
    Weights,
    load_exactly,
    read_tensors,
)

PARTS = {
    "model": Part(hub="someone/scorer", file="weights.pt"),
    "config": Part(hub="someone/scorer", file="config.json", beside="model"),
    "tokenizer": Part(hub="someone/tokenizer"),
}


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """Tiny random weights of the published scorers, by scorer or part."""
    return write_all(tmp_path_factory.mktemp("weights"))


def weights(overrides=None, cache=None, parts=PARTS):
    return Weights("mine", parts, {k: str(v) for k, v in (overrides or {}).items()}, cache)


def cached(cache, content, blob):
    """`content` as someone/scorer's weights.pt, as the hub's client keeps it."""
    home = cache / "models--someone--scorer"
    for name in ("blobs", "refs", "snapshots/" + "0" * 40):
        (home / name).mkdir(parents=True)
    (home / "blobs" / blob).write_bytes(content)
    (home / "snapshots" / ("0" * 40) / "weights.pt").symlink_to(home / "blobs" / blob)
    (home / "refs" / "main").write_text("0" * 40)


def test_a_large_file_of_the_hub_is_verified(tmp_path):
    content = b"x" * 100
    digest = hashlib.sha256(content).hexdigest()
    cached(tmp_path / "good", content, digest)
    path = weights(cache=str(tmp_path / "good")).file()
    assert path.read_bytes() == content
    cached(tmp_path / "bad", content[:-1], digest)
    with pytest.raises(UserError, match=r"mine: .*weights\.pt is damaged.*delete it"):
        weights(cache=str(tmp_path / "bad")).file()
    # A small file is kept under git's own hash, which says nothing of sha256.
    cached(tmp_path / "small", content, "a" * 40)
    assert weights(cache=str(tmp_path / "small")).file().read_bytes() == content


def repository(cache, name, *files):
    """A repository of some files, as the hub's client keeps it."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for file in files:
        (snapshot / file).write_text("{}")


def test_repositories_are_fetched_with_what_is_loaded_of_them(tmp_path):
    parts = {
        "model": Part(hub="someone/model"),
        "tokenizer": Part(hub="someone/tokenizer", files=TOKENIZER_FILES),
    }
    repository(tmp_path, "someone/model", "config.json", "pytorch_model.bin")
    repository(tmp_path, "someone/tokenizer", "config.json", "vocab.txt")
    repository(tmp_path, "else/where", "config.json", "vocab.txt")
    whole = weights(cache=str(tmp_path), parts=parts)
    whole.fetch("model")
    whole.fetch("tokenizer")
    other = weights({"model": "else/where"}, str(tmp_path), parts)
    with pytest.raises(UserError, match=r"mine: cannot get else/where \(it has no model\*\.safe"):
        other.fetch("model")
    (tmp_path / "local").mkdir()
    local = weights({"tokenizer": tmp_path / "local"}, None, parts)
    with pytest.raises(UserError, match=r"no tokenizer\.json or .* --weights mine\.tokenizer"):
        local.fetch("tokenizer")
    (tmp_path / "local" / "vocab.json").write_text("{}")
    local.fetch("tokenizer")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scorer_of_which_anything_is_missing_is_told_before_it_is_loaded(
    name, small_weights, tmp_path
):
    own = {k: v for k, v in small_weights.items() if k.partition(".")[0] == name}
    fetch_weights([name], ScoreOptions(weights=own, cache_dir=str(tmp_path)))
    for part in own:
        others = {k: v for k, v in own.items() if k != part}
        with pytest.raises(UserError, match=f"^{name}: cannot get .* give --weights {part}="):
            fetch_weights([name], ScoreOptions(weights=others, cache_dir=str(tmp_path)))


def test_overrides(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"a")
    (tmp_path / "other.bin").write_bytes(b"b")
    assert weights({"model": tmp_path}).file() == tmp_path / "weights.pt"
    assert weights({"model": tmp_path / "other.bin"}).file() == tmp_path / "other.bin"
    assert weights({"tokenizer": tmp_path}).source("tokenizer") == str(tmp_path)
    assert weights({"tokenizer": "else/where"}).source("tokenizer") == "else/where"
    assert weights().source("tokenizer") == "someone/tokenizer"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--weights mine: there is no file .*weights\.pt"):
        weights({"model": tmp_path / "empty"}).file()
    with pytest.raises(UserError, match=r"--weights mine\.tokenizer: there is no file or dir"):
        weights({"tokenizer": "/no/where"}).source("tokenizer")


def test_beside(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"a")
    with pytest.raises(UserError, match=r"--weights mine: there is no config\.json in .*config=PA"):
        weights({"model": tmp_path}).file("config")
    (tmp_path / "config.json").write_text("{}")
    assert weights({"model": tmp_path}).file("config") == tmp_path / "config.json"
    (tmp_path / "mine.json").write_text("{}")
    both = weights({"model": tmp_path, "config": tmp_path / "mine.json"})
    assert both.file("config") == tmp_path / "mine.json"


def test_another_file_than_the_published_is_said(tmp_path, caplog):
    digest = hashlib.sha256(b"published").hexdigest()
    parts = {"model": Part(url="https://example.org/head.pth", file="head.pth", sha256=digest)}
    (tmp_path / "head.pth").write_bytes(b"published")
    weights({"model": tmp_path}, parts=parts).file()
    assert not caplog.records
    (tmp_path / "head.pth").write_bytes(b"another")
    weights({"model": tmp_path}, parts=parts).file()
    assert "is not the published file" in caplog.text


def test_identity(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"a")
    (tmp_path / "config.json").write_text("{}")
    first = weights({"model": tmp_path}).identity()
    assert first == weights({"model": tmp_path}).identity()
    assert first != weights().identity()
    assert first["tokenizer"] == ["someone/tokenizer"]
    for name in ("weights.pt", "config.json"):
        os.utime(tmp_path / name, ns=(1, 1))
        changed = weights({"model": tmp_path}).identity()
        assert changed != first
        first = changed


def test_reading_tensors(tmp_path):
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "a.pt")
    assert torch.equal(read_tensors(tmp_path / "a.pt", "--x")["a"], state["a"])
    from safetensors.torch import save_file

    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(read_tensors(tmp_path / "a.safetensors", "--x")["a"], state["a"])
    torch.save({"a": os.system}, tmp_path / "code.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("hello")
    for name in ("code.pt", "cut.pt", "text.pt", "none.pt"):
        with pytest.raises(UserError, match=f"--x: cannot read weights from .*{name}"):
            read_tensors(tmp_path / name, "--x")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(2, 3)},
        {"weight": torch.zeros(3, 3), "bias": torch.zeros(2)},
        {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)},
        [1],
    ],
)
def test_loading_is_strict(state):
    with pytest.raises(UserError, match=r"^--x does not fit: "):
        load_exactly(torch.nn.Linear(3, 2), state, "--x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    state = {"weight": torch.ones(2, 3), "bias": torch.tensor([0.0, value])}
    with pytest.raises(UserError, match=r"--weights mine=x is broken: its weight bias"):
        load_exactly(torch.nn.Linear(3, 2), state, "--weights mine=x")

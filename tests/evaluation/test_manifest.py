"""Manifests: written and read back; what is wrong with one is said by row."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.evaluation.generate.manifest import read_manifest, write_manifest


@pytest.fixture
def manifest(tmp_path):
    """Two images and their manifest."""
    (tmp_path / "m").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "m" / f"{i}.png")
    path = tmp_path / "m.json"
    write_manifest(path, [(f"p {i}", f"m/{i}.png", {"category": "c"}) for i in range(2)])
    return path


def change(path, row, **values):
    rows = json.loads(path.read_text())
    for key, value in values.items():
        if value is None:
            del rows[row][key]
        else:
            rows[row][key] = value
    path.write_text(json.dumps(rows))


def test_round_trip(manifest):
    found = read_manifest(manifest)
    assert found.prompts == ["p 0", "p 1"]
    assert found.stem == "m"
    assert len(found) == 2
    assert found.entries[1].category == "c"
    assert found.entries[1].image == manifest.parent / "m" / "1.png"
    assert set(json.loads(manifest.read_text())[0]) == {
        "prompt",
        "gen_image_path",
        "raw_image_path",
        "metadata",
    }


def test_a_published_one_without_metadata(manifest):
    change(manifest, 0, metadata=None)
    change(manifest, 1, raw_image_path=None)
    assert read_manifest(manifest).entries[0].category is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": None}, "row 1: the key prompt is missing"),
        ({"prompt": 3}, "row 1: the key prompt is missing or not text"),
        ({"gen_image_path": None}, "row 1: the key gen_image_path is missing"),
        ({"gen_image_path": ""}, "row 1: gen_image_path is empty"),
        ({"gen_image_path": "m/9.png"}, r"row 1: there is no image .*9\.png"),
        ({"metadata": [1]}, "row 1: metadata must be an object"),
    ],
)
def test_bad_rows(manifest, values, said):
    change(manifest, 1, **values)
    with pytest.raises(UserError, match=f"{manifest}, {said}"):
        read_manifest(manifest)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must be a list of at least one image"),
        ("{}", "must be a list"),
        ("[1]", "row 0: must be an object, found int"),
        ("[", "cannot read the manifest"),
        (None, "there is no manifest"),
    ],
)
def test_bad_files(tmp_path, text, said):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_manifest(path)

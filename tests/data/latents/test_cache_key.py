"""A cache that was made for something else is refused, in one sentence that says what differs."""

from __future__ import annotations

import copy

import pytest

from sdpo.common.errors import UserError
from sdpo.data.latents.key import check_key, differences

KEY = {
    "family": "sd15",
    "vae": "v",
    "text": "t",
    "precision": "no",
    "dtype": "bf16",
    "resolution": 512,
    "transform": "centre",
    "flips": True,
    "dataset": "d",
    "made_of": {"vae": "my/vae", "text": "my/base", "dataset": "pairs (train, 7 rows)"},
}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("family", "sdxl", "family sdxl (this run: sd15)"),
        ("vae", "w", "another VAE, then of my/vae (this run: my/vae)"),
        ("text", "u", "other text encoders or tokenizers, then of my/base (this run: my/base)"),
        ("precision", "bf16", "--mixed_precision bf16 (this run: no)"),
        ("dtype", "fp32", "--cache_dtype fp32 (this run: bf16)"),
        ("resolution", 1024, "--resolution 1024 (this run: 512)"),
        (
            "transform",
            "corner",
            "another version's way from files to pixels, 'corner' (this run: 'centre')",
        ),
        ("flips", False, "--no_hflip (this run flips)"),
        ("dataset", "e", "other images, then of pairs (train, 7 rows)"),
    ],
)
def test_what_differs_is_said(name, value, said, tmp_path):
    (found,) = differences({**KEY, name: value}, KEY)
    assert found.startswith(said)
    with pytest.raises(UserError) as raised:
        check_key(tmp_path, {**KEY, name: value}, KEY)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_several_differences_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"resolution 64.*; another VAE.*; give another directory"):
        check_key(tmp_path, {**KEY, "resolution": 64, "vae": "w"}, KEY)


def test_what_does_not_matter(tmp_path):
    check_key(tmp_path, KEY, KEY)
    elsewhere = copy.deepcopy(KEY)
    elsewhere["made_of"] = {"vae": "/a", "text": "/b", "dataset": "/c"}
    check_key(tmp_path, elsewhere, KEY)
    check_key(tmp_path, KEY, {**KEY, "flips": False})

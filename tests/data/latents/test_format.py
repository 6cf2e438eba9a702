"""What is on disk stays as it was: literals of a cache that commit 6175d9c wrote, but for how
images are read, by which what it wrote is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.latents.key import check_key, make_key
from sdpo.data.latents.manifest import gather_entries, read_manifest, start_manifest
from sdpo.data.latents.store import LatentCache, caption_digest, write_shard
from sdpo.data.source import open_pairs
from sdpo.models import get_family
from sdpo.models.base import ModelSource

MODEL = {
    "vae/config.json": '{"_class_name": "AutoencoderKL", "scaling_factor": 0.5, '
    '"_diffusers_version": "0.35"}',
    "vae/diffusion_pytorch_model.safetensors": "the VAE",
    "text_encoder/config.json": '{"hidden_size": 8, "transformers_version": "4.56"}',
    "text_encoder/model.safetensors": "the text encoder",
    "tokenizer/vocab.json": "{}",
    "tokenizer/merges.txt": "#version: 0.2",
}
READING = "upright by EXIF, transparency over white, deep grey scaled"
KEY = {
    "family": "sd15",
    "vae": "412ac305c930923f712e686f706f201fd3a2ebc633c247e5ba9b1170cd5bcd0f",
    "text": "5ec3022dd38f5dd6a41c6e5fcaac6d3f937024fd66b01fb2bb27afc9120d74fe",
    "precision": "no",
    "dtype": "bf16",
    "resolution": 64,
    "transform": f"{READING}; shorter side resized bilinearly, centre crop, 1",
    "flips": True,
    "dataset": "3b72c49039833a48f51a658a2e401e36bc4dbe8a87df170c8fa5c5ca41196152",
    "made_of": {
        "vae": "/models/base",
        "text": "/models/base",
        "dataset": "/pairs (train, 3 rows)",
    },
}
ABOUT = {"latent_shape": [4, 1, 1], "scaling_factor": 0.5, "shift_factor": None}
DIGESTS = [
    "995c5d926e0ad54ff11948041a3a0211",
    "ba6842be1117351cbae3361e11eed2d0",
    "cae66941d9efbd404e4d88758ea67670",
]
LATENTS_FILE = "latents-00000000.safetensors"
TEXT_FILE = f"text-{DIGESTS[0]}.safetensors"
LATENTS_ENTRY = (
    '{"kind": "latents", "file": "latents-00000000.safetensors", "size": 344, "sha256": '
    '"4729cffe36659e3489a9a2bd517c309d985cfdb641a5bb0c5943fc7e7710ce1c", "items": [0, 2], '
    '"bad": {"1": "not in a known image format"}}'
)
TEXT_ENTRY = (
    '{"kind": "text", "file": "text-995c5d926e0ad54ff11948041a3a0211.safetensors", "size": 120, '
    '"sha256": "cde8214fb0b4831ab00733bd5d07911afc0d89a0ec2d5619336a90b2d64ce2d3", "items": '
    '["995c5d926e0ad54ff11948041a3a0211", "ba6842be1117351cbae3361e11eed2d0", '
    '"cae66941d9efbd404e4d88758ea67670"], "bad": {}}'
)
MANIFEST = f"""{{
  "format": 1,
  "key": {{
    "family": "sd15",
    "vae": "412ac305c930923f712e686f706f201fd3a2ebc633c247e5ba9b1170cd5bcd0f",
    "text": "5ec3022dd38f5dd6a41c6e5fcaac6d3f937024fd66b01fb2bb27afc9120d74fe",
    "precision": "no",
    "dtype": "bf16",
    "resolution": 64,
    "transform": "{READING}; shorter side resized bilinearly, centre crop, 1",
    "flips": true,
    "dataset": "3b72c49039833a48f51a658a2e401e36bc4dbe8a87df170c8fa5c5ca41196152",
    "made_of": {{
      "vae": "/models/base",
      "text": "/models/base",
      "dataset": "/pairs (train, 3 rows)"
    }}
  }},
  "about": {{
    "latent_shape": [
      4,
      1,
      1
    ],
    "scaling_factor": 0.5,
    "shift_factor": null
  }},
  "counts": {{
    "rows": 2,
    "bad_rows": 1,
    "captions": 3
  }},
  "shards": [
{LATENTS_ENTRY},
{TEXT_ENTRY}
  ]
}}
"""
LATENTS_HEADER = (
    b'P\0\0\0\0\0\0\0{"moments":{"dtype":"F32","shape":[2,2,2,2,4,1,1],"data_offsets":[0,256]}}'
    b"      "
)
TEXT_HEADER = b'@\0\0\0\0\0\0\0{"hidden":{"dtype":"F32","shape":[3,2,2],"data_offsets":[0,48]}}'
MOMENTS = torch.arange(64.0).reshape(2, 2, 2, 2, 4, 1, 1)
HIDDEN = torch.arange(12.0).reshape(3, 2, 2)


def file_of(header: bytes, values: torch.Tensor) -> bytes:
    return header + np.asarray(values, dtype="<f4").tobytes()


FILES = {
    "manifest.json": MANIFEST.encode(),
    LATENTS_FILE: file_of(LATENTS_HEADER, MOMENTS),
    TEXT_FILE: file_of(TEXT_HEADER, HIDDEN),
}


@pytest.fixture
def model(tmp_path):
    """What a key is made of, of files whose content is written down here."""
    for name, text in MODEL.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return ModelSource(str(tmp_path / "model"))


@pytest.fixture
def pairs_config(make_config, tmp_path):
    """A run on three pairs of image files."""
    directory, lines = tmp_path / "pairs", []
    directory.mkdir()
    for i in range(3):
        names = {f"image_{side}": f"{i}-{side}.png" for side in (0, 1)}
        for side in (0, 1):
            (directory / f"{i}-{side}.png").write_text(f"image {side} of pair {i}")
        lines.append(json.dumps({"caption": f"caption {i}", "label_0": i % 2, **names}))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return make_config(train_data_dir=directory)


def test_the_key_of_a_run_is_the_one_it_was(model, pairs_config, tmp_path):
    pairs = open_pairs(pairs_config.data, 0)
    key = make_key(pairs_config, get_family("sd15"), model, pairs)
    assert {**key, "made_of": KEY["made_of"]} == KEY
    assert list(key) == list(KEY)
    assert key["made_of"] == {
        "vae": model.base,
        "text": model.base,
        "dataset": f"{tmp_path / 'pairs'} (train, 3 rows)",
    }
    check_key(tmp_path, KEY, key)


def test_a_cache_of_before_images_were_read_upright_is_refused(tmp_path):
    before = {**KEY, "transform": "shorter side resized bilinearly, centre crop, 1"}
    with pytest.raises(UserError) as raised:
        check_key(tmp_path, before, KEY)
    (sentence,) = str(raised.value).splitlines()
    assert str(tmp_path) in sentence
    assert "another version's way from files to pixels" in sentence
    assert "this run: 'upright by EXIF, transparency over white, deep grey scaled" in sentence
    assert "delete this one to have it made anew" in sentence


def test_a_cache_written_then_opens_and_is_complete(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    manifest = read_manifest(tmp_path)
    assert (manifest.key, manifest.about) == (KEY, ABOUT)
    cache = LatentCache(tmp_path, manifest)
    cache.verify()
    assert cache.missing_rows(np.arange(3)).tolist() == []
    assert cache.missing_captions(map(caption_digest, ("", "caption 0", "caption 2"))) == []
    assert cache.bad == {1: "not in a known image format"}
    assert torch.equal(cache.moments(2, True), MOMENTS[1, 1])
    place = DIGESTS.index(caption_digest("caption 2"))
    assert torch.equal(cache.text("caption 2")["hidden"], HIDDEN[place])


def test_the_same_files_are_written(tmp_path):
    start_manifest(tmp_path, KEY, ABOUT)
    bad = {1: "not in a known image format"}
    write_shard(tmp_path, "latents", "00000000", [0, 2], {"moments": MOMENTS}, bad)
    write_shard(tmp_path, "text", DIGESTS[0], DIGESTS, {"hidden": HIDDEN})
    assert (tmp_path / "latents-00000000.json").read_text() == LATENTS_ENTRY + "\n"
    assert (tmp_path / f"text-{DIGESTS[0]}.json").read_text() == TEXT_ENTRY + "\n"
    gather_entries(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES

"""Models and data sets are told apart by their content, wherever they lie."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.common.errors import UserError
from sdpo.data.latents import identity
from sdpo.data.latents.identity import dataset_digest, text_digest, vae_digest
from sdpo.data.source import open_pairs
from sdpo.models import get_family
from sdpo.models.base import ModelSource


@pytest.fixture(params=["sd15", "sdxl"])
def model(request, tiny_sd15, tiny_sdxl, tmp_path):
    """(family, a copy of its tiny model)."""
    family = get_family(request.param)
    path = tmp_path / "model"
    shutil.copytree(tiny_sdxl if family.sdxl else tiny_sd15, path)
    return family, path


def digests(family, path, **source):
    found = ModelSource(str(path), **source)
    return vae_digest(found), text_digest(family, found)


def changed(path, offset=-1):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_model_elsewhere_is_the_same(model, tmp_path):
    family, path = model
    before = digests(family, path)
    path.rename(tmp_path / "moved")
    config = tmp_path / "moved" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_diffusers_version": "9.9"}))
    assert digests(family, tmp_path / "moved") == before


def test_what_is_read_counts_and_nothing_else(model):
    family, path = model
    vae, text = digests(family, path)
    changed(path / "unet" / "diffusion_pytorch_model.safetensors")
    assert digests(family, path) == (vae, text)
    changed(path / "vae" / "diffusion_pytorch_model.safetensors")
    other = digests(family, path)
    assert other[0] != vae
    assert other[1] == text
    encoders = list(family.facts.text)
    tokenizers = [family.facts.text[folder].tokenizer for folder in encoders]
    seen = {text}
    for part in encoders:
        changed(path / part / "model.safetensors")
        seen.add(digests(family, path)[1])
    for part in tokenizers:
        config = path / part / "tokenizer_config.json"
        config.write_text(config.read_text().replace("24", "25"))
        seen.add(digests(family, path)[1])
    assert len(seen) == 1 + len(encoders) + len(tokenizers)
    vae_config = path / "vae" / "config.json"
    value = json.loads(vae_config.read_text())
    vae_config.write_text(json.dumps({**value, "scaling_factor": 0.5}))
    assert digests(family, path)[0] != other[0]


@pytest.mark.parametrize("name", ["chat_template.jinja", "added_tokens.json", "tokenizer.model"])
def test_what_a_language_models_tokenizer_reads_counts(model, name):
    family, path = model
    seen = {digests(family, path)[1]}
    for content in ("a", "b"):
        (path / family.facts.text["text_encoder"].tokenizer / name).write_text(content)
        seen.add(digests(family, path)[1])
    assert len(seen) == 3


def test_weights_of_the_variant_fp16_alone(model):
    """They are loaded, so a cache is made of them too."""
    family, path = model
    before = digests(family, path)
    for part in ("vae", *family.facts.text):
        (file,) = (path / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert digests(family, path) == before


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_every_shard_counts(model, tmp_path, variant):
    import diffusers

    family, path = model
    vae = diffusers.AutoencoderKL.from_pretrained(path / "vae")
    for file in (path / "vae").glob("*.safetensors"):
        file.unlink()
    vae.save_pretrained(path / "vae", max_shard_size="60KB", variant=variant)
    shards = list((path / "vae").glob("*.safetensors"))
    assert len(shards) > 1
    seen = {digests(family, path)[0]}
    for shard in shards:
        changed(shard)
        seen.add(digests(family, path)[0])
    assert len(seen) == 1 + len(shards)


def test_a_vae_of_its_own(model, tmp_path):
    family, path = model
    shutil.copytree(path / "vae", tmp_path / "vae")
    assert digests(family, path, vae=str(tmp_path / "vae")) == digests(family, path)
    changed(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert digests(family, path, vae=str(tmp_path / "vae"))[0] != digests(family, path)[0]


def test_from_the_hubs_cache_without_reading_blobs_named_by_their_sha256(
    model, tmp_path, monkeypatch
):
    family, path = model
    local = digests(family, path)
    home = tmp_path / "cache" / "models--someone--tiny"
    commit = home / "snapshots" / ("0" * 40)
    shutil.copytree(path, commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit.name)
    (home / "blobs").mkdir()
    for weights in commit.rglob("*.safetensors"):
        blob = home / "blobs" / identity.file_sha256(weights)
        weights.replace(blob)
        weights.symlink_to(blob)
    read = []
    whole = identity.file_sha256
    monkeypatch.setattr(identity, "file_sha256", lambda p: read.append(p.name) or whole(p))
    found = ModelSource("someone/tiny", cache_dir=str(tmp_path / "cache"))
    assert (vae_digest(found), text_digest(family, found)) == local
    assert not [name for name in read if name.endswith(".safetensors")]
    with pytest.raises(UserError, match="nobody/none"):
        vae_digest(ModelSource("nobody/none", cache_dir=str(tmp_path / "cache")))


def test_sharded_and_missing_weights(tiny_sd15, tmp_path):
    shutil.copytree(tiny_sd15, tmp_path / "model")
    folder = tmp_path / "model" / "text_encoder"
    weights = folder / "model.safetensors"
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part in parts:
        shutil.copy(weights, folder / part)
    weights.unlink()
    index = {"weight_map": {"a": parts[0], "b": parts[1], "c": parts[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    family, source = get_family("sd15"), ModelSource(str(tmp_path / "model"))
    before = text_digest(family, source)
    changed(folder / parts[1])
    assert text_digest(family, source) != before
    shutil.rmtree(tmp_path / "model" / "vae")
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path: .* no weights in vae"):
        vae_digest(source)


@pytest.fixture
def table(pairs_dir):
    """The rows of the tiny pairs."""
    paths = sorted(pairs_dir.glob("train-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def digest_of(make_config, tmp_path):
    """`digest_of(rows, flag=value, ...)`: the digest of a data set of these rows."""
    made = []

    def digest(rows, **flags):
        made.append(tmp_path / f"data-{len(made)}")
        made[-1].mkdir()
        pq.write_table(pa.Table.from_pylist(rows), made[-1] / "train.parquet")
        return dataset_digest(open_pairs(make_config(train_data_dir=made[-1], **flags).data, 0))

    return digest


@pytest.mark.parametrize("whole", [0, 2**30])
def test_a_dataset_is_its_images(table, digest_of, monkeypatch, whole):
    monkeypatch.setattr(identity, "HASHED_WHOLE", whole)
    monkeypatch.setattr(identity, "SAMPLED_ROWS", 2)
    whole = digest_of(table)
    assert digest_of(table) == whole
    assert digest_of(table, max_train_samples=3) == whole
    captions = [{**row, "caption": "another", "label_0": 1.0} for row in table]
    assert digest_of(captions) == whole
    longer = [dict(row) for row in table]
    longer[40]["jpg_1"] += b"x"
    swapped = [{**row, "jpg_0": row["jpg_1"], "jpg_1": row["jpg_0"]} for row in table]
    same_length = [dict(row) for row in table]
    same_length[0]["jpg_0"] = same_length[0]["jpg_0"][:-1] + b"\0"
    others = [longer, swapped, same_length, table[:-1], [*table, table[0]]]
    assert len({whole, *map(digest_of, others)}) == 1 + len(others)


def test_one_byte_of_any_image_counts_where_all_are_read(table, digest_of):
    other = [dict(row) for row in table]
    other[40]["jpg_1"] = other[40]["jpg_1"][:-1] + b"\0"
    assert digest_of(other) != digest_of(table)


@pytest.mark.parametrize("whole", [0, 2**30])
def test_images_in_files(table, make_config, tmp_path, monkeypatch, whole):
    monkeypatch.setattr(identity, "HASHED_WHOLE", whole)
    monkeypatch.setattr(identity, "SAMPLED_ROWS", 2)
    rows = []
    for i, row in enumerate(table[:6]):
        for side in (0, 1):
            (tmp_path / f"{i}-{side}.png").write_bytes(row[f"jpg_{side}"])
        about = {"caption": row["caption"], "label_0": 1}
        rows.append({"image_0": f"{i}-0.png", "image_1": f"{i}-1.png", **about})
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "metadata.jsonl").write_text(lines)
    pairs = open_pairs(make_config(train_data_dir=tmp_path).data, 0)
    before = dataset_digest(pairs)
    assert dataset_digest(replace(pairs, base=tmp_path / "." / "")) == before
    changed = tmp_path / "3-1.png"
    changed.write_bytes(table[3]["jpg_1"][:-1] + b"\0")
    other = dataset_digest(pairs)  # of the same length
    changed.write_bytes(b"longer" + table[3]["jpg_1"])
    longer = dataset_digest(pairs)
    changed.unlink()
    assert len({before, other, longer, dataset_digest(pairs)}) == 4

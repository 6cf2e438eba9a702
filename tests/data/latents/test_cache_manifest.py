"""The list of shards: what counts as finished, and what is made of remains."""

from __future__ import annotations

import json

import pytest

from sdpo.common.errors import UserError
from sdpo.common.files import write_text
from sdpo.data.latents.manifest import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    clear_unfinished,
    entry_path,
    gather_entries,
    read_manifest,
    start_manifest,
)

KEY, ABOUT = {"vae": "x"}, {"latent_shape": [4, 8, 8]}


def put(directory, file, items, bad=None):
    """A finished shard with its own entry."""
    kind = file.split("-")[0]
    (directory / file).write_bytes(b"content")
    shard = {"kind": kind, "file": file, "size": 7, "sha256": "s", "items": items}
    write_text(entry_path(directory, file), json.dumps({**shard, "bad": bad or {}}))


def test_no_directory_and_no_manifest_are_no_cache(tmp_path):
    assert read_manifest(tmp_path / "none") is None
    assert read_manifest(tmp_path) is None


def test_entries_are_gathered(tmp_path):
    start_manifest(tmp_path, KEY, ABOUT)
    put(tmp_path, "latents-00000004.safetensors", [4, 6], {"5": "broken"})
    put(tmp_path, "latents-00000000.safetensors", [0, 1])
    put(tmp_path, "text-0a.safetensors", ["0a", "ff"])
    before = read_manifest(tmp_path)
    gathered = gather_entries(tmp_path)
    assert [s.file for s in gathered.shards] == sorted(s.file for s in before.shards)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MANIFEST_FILE, *(s.file for s in gathered.shards)}
    again = read_manifest(tmp_path)
    assert again == gathered
    assert (again.key, again.about) == (KEY, ABOUT)
    assert [s.items for s in again.shards] == [[0, 1], [4, 6], ["0a", "ff"]]
    assert again.shards[1].bad == {5: "broken"}
    counts = json.loads((tmp_path / MANIFEST_FILE).read_text())["counts"]
    assert counts == {"rows": 4, "bad_rows": 1, "captions": 2}


def test_killed_between_gathering_and_deleting_entries(tmp_path):
    start_manifest(tmp_path, KEY, ABOUT)
    put(tmp_path, "latents-00000000.safetensors", [0])
    entry = entry_path(tmp_path, "latents-00000000.safetensors")
    kept = entry.read_text()
    gather_entries(tmp_path)
    entry.write_text(kept)
    assert [s.items for s in read_manifest(tmp_path).shards] == [[0]]
    assert [s.items for s in gather_entries(tmp_path).shards] == [[0]]
    assert not entry.exists()


def test_a_shard_that_is_gone_is_not_there(tmp_path):
    start_manifest(tmp_path, KEY, ABOUT)
    put(tmp_path, "latents-00000000.safetensors", [0])
    put(tmp_path, "latents-00000001.safetensors", [1])
    gather_entries(tmp_path)
    (tmp_path / "latents-00000000.safetensors").unlink()
    assert [s.items for s in read_manifest(tmp_path).shards] == [[1]]


def test_a_shard_of_another_size_is_refused(tmp_path):
    start_manifest(tmp_path, KEY, ABOUT)
    put(tmp_path, "latents-00000000.safetensors", [0])
    gather_entries(tmp_path)
    (tmp_path / "latents-00000000.safetensors").write_bytes(b"conten")
    with pytest.raises(UserError, match=r"latents-0+\.safetensors is damaged: it has 6 bytes"):
        read_manifest(tmp_path)


def test_unfinished_files_are_deleted_and_no_others(tmp_path):
    manifest = start_manifest(tmp_path, KEY, ABOUT)
    put(tmp_path, "latents-00000000.safetensors", [0])
    kept = {path.name for path in tmp_path.iterdir()} | {"notes.txt"}
    for name in ("latents-00000001.safetensors", "text-0a.safetensors.tmp", "notes.txt"):
        (tmp_path / name).write_bytes(b"half")
    manifest = read_manifest(tmp_path)
    clear_unfinished(tmp_path, manifest)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_shards_of_unknown_origin_are_not_adopted(tmp_path):
    put(tmp_path, "latents-00000000.safetensors", [0])
    with pytest.raises(UserError, match=r"but no manifest\.json"):
        start_manifest(tmp_path, KEY, ABOUT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1, "key": {}, "ab', "cannot be read"),
        ('{"format": 1, "key": {}}', "cannot be read"),
        ('{"format": 2, "key": {}, "about": {}, "shards": []}', "format 2, this version reads 1"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, text, said):
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(UserError, match=said):
        read_manifest(tmp_path)


def test_one_shard_a_line(tmp_path):
    shards = [Shard("latents", f"latents-{i}", 1, "s", [i]) for i in range(3)]
    Manifest(KEY, ABOUT, shards).write(tmp_path)
    lines = (tmp_path / MANIFEST_FILE).read_text().splitlines()
    assert sum('"kind"' in line for line in lines) == 3
    assert read_manifest(tmp_path).shards == []

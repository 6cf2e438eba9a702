"""Reading shards: the right rows from few open files, in any process; damage is noticed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.common.files import write_text
from sdpo.data.latents import store
from sdpo.data.latents.manifest import LATENTS, TEXT, Manifest, read_manifest
from sdpo.data.latents.store import MOMENTS, LatentCache, caption_digest, write_shard

ROWS = [3, 0, 7, 9, 12]


def moments(row, flip, dtype=torch.float32):
    return torch.full((2, 2, 4, 2, 2), row + 0.5 * flip).to(dtype)


@pytest.fixture
def cache(tmp_path):
    """Five rows, one a shard, each filled with its number, and two captions."""
    Manifest({}, {"latent_shape": [4, 2, 2]}).write(tmp_path)
    for row in ROWS:
        views = torch.stack([moments(row, False), moments(row, True)])
        bad = {row + 1: "broken"} if row == 9 else {}
        write_shard(tmp_path, LATENTS, f"{row:08d}", [row], {MOMENTS: views[None]}, bad)
    digests = sorted(map(caption_digest, ("", "Ünïcode")))
    hidden = torch.stack([torch.full((3, 2), float(d == caption_digest(""))) for d in digests])
    write_shard(tmp_path, TEXT, digests[0], digests, {"hidden": hidden, "pooled": hidden[:, 0]})
    return LatentCache(tmp_path, read_manifest(tmp_path))


def check(cache):
    for row in (*ROWS, *reversed(ROWS)):
        for flip in (False, True):
            assert torch.equal(cache.moments(row, flip), moments(row, flip))
    assert cache.text("")["hidden"].tolist() == [[1.0, 1.0]] * 3
    assert cache.text("Ünïcode")["pooled"].tolist() == [0.0, 0.0]


def test_rows_and_captions(cache):
    check(cache)
    assert cache.bad == {10: "broken"}
    assert "5 pairs and 2 captions in 6 files" in cache.summary


def test_what_is_missing(cache):
    assert cache.missing_rows(np.array([0, 1, 9, 10, 12, 40])).tolist() == [1, 40]
    assert cache.missing_rows(np.array([], dtype=np.int64)).tolist() == []
    known, other = caption_digest(""), caption_digest("other")
    assert cache.missing_captions([known, other]) == [other]


def test_an_empty_cache_misses_all(tmp_path):
    cache = LatentCache(tmp_path, Manifest({}, {}))
    assert cache.missing_rows(np.array([0, 5])).tolist() == [0, 5]
    assert cache.missing_captions(["a"]) == ["a"]


def test_few_files_are_open(cache, monkeypatch):
    monkeypatch.setattr(store, "OPEN_FILES", 2)
    check(cache)
    assert len(cache._files._open) == 2


def test_a_copy_in_another_process_opens_its_own(cache):
    check(cache)
    copied = pickle.loads(pickle.dumps(cache))
    assert not copied._files._open
    check(copied)


def test_checksums(cache, tmp_path):
    cache.verify()
    path = tmp_path / f"latents-{7:08d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = LatentCache(tmp_path, read_manifest(tmp_path))
    place = [shard.file for shard in found.shards].index(path.name)
    with pytest.raises(UserError, match=r"latents-00000007\.safetensors is damaged: its sha"):
        found.verify()
    with pytest.raises(UserError, match="damaged"):
        found.verify(place % 3, 3)
    found.verify((place + 1) % 3, 3)


def test_a_header_that_cannot_be_read(cache, tmp_path):
    path = tmp_path / f"latents-{7:08d}.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"00000007\.safetensors is damaged.*delete it"):
        cache.moments(7)


def test_a_kill_before_the_entry_leaves_no_shard(tmp_path, monkeypatch):
    Manifest({}, {}).write(tmp_path)

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, LATENTS, "00000001", [1], {MOMENTS: torch.zeros(1)})
    assert read_manifest(tmp_path).shards == []
    monkeypatch.setattr(store, "write_text", write_text)
    write_shard(tmp_path, LATENTS, "00000001", [1], {MOMENTS: torch.zeros(1)})
    assert [shard.items for shard in read_manifest(tmp_path).shards] == [[1]]

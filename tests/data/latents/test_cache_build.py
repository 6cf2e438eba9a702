"""Encoding what is missing: whole, resumed, bad rows, several processes' shares."""

from __future__ import annotations

import fcntl
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.common.images import open_image
from sdpo.data.latents import build
from sdpo.data.latents.build import Builder, Work, all_captions
from sdpo.data.latents.manifest import read_manifest
from sdpo.data.latents.store import LatentCache, caption_digest
from sdpo.data.source import open_pairs
from sdpo.data.transforms import PairTransform


@pytest.fixture
def data(pairs_dir, tmp_path):
    """`data(change=None)`: a directory of 16 of the pairs, after `change(rows)`."""

    def write(change=None):
        rows = pq.read_table(min(pairs_dir.glob("train-*.parquet"))).to_pylist()[:16]
        if change:
            change(rows)
        (tmp_path / "data").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train.parquet")
        return tmp_path / "data"

    return write


def break_rows(*numbers):
    def change(rows):
        for number in numbers:
            rows[number]["jpg_1"] = b"broken"
            rows[number]["label_0"] = 1.0

    return change


def contents(ready):
    """All that a cache holds, by row and by caption."""
    rows = [int(r) for r in ready.pairs.origin if r not in ready.cache.bad]
    latents = {r: torch.stack([ready.cache.moments(r, f) for f in (False, True)]) for r in rows}
    return latents, {c: ready.cache.text(c) for c in all_captions(ready.pairs)}


def assert_equal(found, wanted):
    # Convolutions over batches of other sizes may add up in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sdxl", [False, True])
def test_posteriors_and_texts(prepare, cache_config, data, sdxl):
    ready = prepare(cache_config(sdxl=sdxl, train_data_dir=data()))
    frozen = ready.family.load_frozen(ready.source)
    latents, texts = contents(ready)
    transform = PairTransform(32)
    for row, found in latents.items():
        for side in (0, 1):
            image = open_image(ready.pairs.given[row][f"jpg_{side}"])
            for flip in (False, True):
                pixels = transform._one(image, (0.5, 0.5), flip, None)
                with torch.no_grad():
                    posterior = frozen.vae.encode(pixels[None]).latent_dist
                wanted = torch.stack([posterior.mean[0], posterior.std[0]])
                assert_equal(found[int(flip), side], wanted)
    assert not torch.equal(latents[0][0], latents[0][1])
    assert "" in texts
    for caption, found in texts.items():
        (wanted, found) = ready.family.encode_text(frozen, [caption]), dict(found)
        assert_equal(found, {name: t[0] for name, t in wanted.items()})
    assert set(found) == ({"hidden", "pooled"} if sdxl else {"hidden"})


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_rounding(prepare, cache_config, data, tmp_path, dtype, bound):
    where = data()
    exact = contents(prepare(cache_config(train_data_dir=where)))
    flags = {"cache_dtype": dtype, "cache_dir_latents": tmp_path / dtype}
    rounded = contents(prepare(cache_config(train_data_dir=where, **flags)))
    for row, wanted in exact[0].items():
        found = rounded[0][row]
        assert found.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        error = (found.float() - wanted).abs()
        assert (error <= bound * wanted.abs() + 1e-7).all()
        assert error.max() > 0


def test_no_flips(prepare, cache_config, data):
    ready = prepare(cache_config(train_data_dir=data(), no_hflip=True))
    (file,) = (s.file for s in ready.cache.shards if s.kind == "latents")
    assert ready.cache._files.tensors(file)["moments"].get_shape()[1] == 1, "one view"
    with pytest.raises(UserError, match="--no_hflip"):
        prepare(cache_config(train_data_dir=ready.config.data.train_data_dir))


def test_a_run_without_flips_completes_a_cache_with_flips(prepare, cache_config, data):
    where = data()
    prepare(cache_config(train_data_dir=where, max_train_samples=5))
    prepare(cache_config(train_data_dir=where, no_hflip=True))
    ready = prepare(cache_config(train_data_dir=where))
    latents, _ = contents(ready)
    assert len(latents) == len(ready.pairs)


def test_only_what_is_missing_is_encoded(prepare, cache_config, data, tmp_path, monkeypatch):
    where = data()
    whole = contents(prepare(cache_config(train_data_dir=where, cache_dir_latents=tmp_path / "a")))
    some = prepare(cache_config(train_data_dir=where, max_train_samples=5))
    before = {s.file: (tmp_path / "latents" / s.file).stat().st_mtime_ns for s in some.cache.shards}
    encoded = []
    one = Builder._encode_images
    monkeypatch.setattr(
        Builder, "_encode_images", lambda self, p, rows: encoded.extend(rows) or one(self, p, rows)
    )
    every = prepare(cache_config(train_data_dir=where))
    assert sorted([*encoded, *some.pairs.origin]) == every.pairs.origin.tolist()
    for file, time in before.items():
        assert (tmp_path / "latents" / file).stat().st_mtime_ns == time
    assert_equal(contents(every), whole)


def test_an_interrupted_build_goes_on(prepare, cache_config, data, tmp_path, monkeypatch):
    config = cache_config(train_data_dir=data(), cache_batch_size=2)
    whole = contents(
        prepare(
            cache_config(
                train_data_dir=config.data.train_data_dir, cache_dir_latents=tmp_path / "a"
            )
        )
    )
    monkeypatch.setattr(build, "SHARD_BYTES", 3 * 8 * 4 * 8 * 8 * 4)  # three pairs
    written = []
    one = build.write_shard

    def until(directory, kind, *rest):
        if kind == "latents" and len(written) == 2:
            # As SIGKILL leaves it: half a file, under its last name or before its entry.
            (directory / "latents-00000099.safetensors.tmp").write_bytes(b"half")
            (directory / f"latents-{rest[0]}.safetensors").write_bytes(b"whole, without an entry")
            raise KeyboardInterrupt
        shard = one(directory, kind, *rest)
        written.extend([shard] if kind == "latents" else [])
        return shard

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(build, "write_shard", until)
        prepare(config)
    assert [len(s.items) for s in written] == [3, 3]
    # Not gathered, and all the same there.
    finished = {s.file: s.sha256 for s in read_manifest(tmp_path / "latents").shards}
    assert {s.file for s in written} < set(finished)
    ready = prepare(config)
    assert {s.file: s.sha256 for s in ready.cache.shards if s.file in finished} == finished
    assert_equal(contents(ready), whole)
    files = {path.name for path in (tmp_path / "latents").iterdir()}
    assert files == {"manifest.json", "lock", *(s.file for s in ready.cache.shards)}
    ready.cache.verify()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_are_remembered(prepare, cache_config, data, workers, monkeypatch):
    where = data(break_rows(3, 4))
    flags = {"train_data_dir": where, "max_bad_fraction": 1.0, "cache_batch_size": 2}
    ready = prepare(cache_config(**flags, dataloader_num_workers=workers))
    assert ready.cache.bad == {3: "not in a known image format", 4: "not in a known image format"}
    assert set(contents(ready)[0]) == set(ready.pairs.origin.tolist()) - {3, 4}
    monkeypatch.setattr(Builder, "build", lambda *a: pytest.fail("nothing is missing"))
    assert prepare(cache_config(**flags)).cache.bad == ready.cache.bad


def test_a_shard_of_bad_rows_alone(prepare, cache_config, data, monkeypatch):
    monkeypatch.setattr(build, "SHARD_BYTES", 1)
    where = data(break_rows(0))
    ready = prepare(cache_config(train_data_dir=where))
    assert set(ready.cache.bad) == {0}
    assert len(contents(ready)[0]) == len(ready.pairs) - 1


def test_too_many_bad_rows(prepare, cache_config, data):
    where = data(break_rows(0, 1, 2, 3, 5))
    with pytest.raises(UserError, match="5 of 8 pairs cannot be decoded"):
        prepare(cache_config(train_data_dir=where))


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_shares(prepare, cache_config, data, tmp_path, world_size, monkeypatch):
    """Processes one after another write what one process writes."""
    where = data()
    whole = prepare(cache_config(train_data_dir=where))
    directory = tmp_path / "apart"
    directory.mkdir()
    frozen = whole.family.load_frozen(whole.source)
    captions = sorted(all_captions(whole.pairs), key=caption_digest)
    written = []
    one = build.write_shard
    monkeypatch.setattr(build, "write_shard", lambda *a: written.append(one(*a)))
    for rank in range(min(world_size, 20)):
        builder = Builder(
            directory,
            whole.family,
            frozen,
            torch.device("cpu"),
            whole.config,
            True,
            rank,
            world_size,
        )
        builder.build(Work(whole.pairs.origin, captions), whole.pairs)
    (directory / "manifest.json").write_text('{"format": 1, "key": {}, "about": {}, "shards": []}')
    found = LatentCache(directory, read_manifest(directory))
    assert_equal(contents(SimpleNamespace(cache=found, pairs=whole.pairs)), contents(whole))
    assert sum(len(s.items) for s in found.shards) == len(whole.pairs) + len(captions)
    assert len(written) == len(found.shards), "no shard is made twice"
    if world_size > 1:
        assert len(found.shards) >= 2 * min(world_size, 3)


def test_two_runs_do_not_build_one_cache(prepare, cache_config, data, tmp_path):
    where = data()
    (tmp_path / "latents").mkdir()
    with open(tmp_path / "latents" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is encoding into"):
            prepare(cache_config(train_data_dir=where))
    prepare(cache_config(train_data_dir=where))


def test_an_overflow_is_not_kept(prepare, cache_config, data, monkeypatch):
    from sdpo.models.base import Family

    whole = Family.encode_posterior

    def huge(self, frozen, pixels):
        mean, std = whole(self, frozen, pixels)
        return mean * 1e6, std

    monkeypatch.setattr(Family, "encode_posterior", huge)
    with pytest.raises(UserError, match="is not finite in --mixed_precision no and --cache_dtype"):
        prepare(cache_config(train_data_dir=data(), cache_dtype="fp16"))


def test_captions(data, make_config):
    def lists(rows):
        for i, row in enumerate(rows):
            row["label_0"] = 1.0
            row["caption"] = [[], ["b", f"a{i % 2}"], None, ["", None]][i % 4]

    pairs = open_pairs(make_config(train_data_dir=data(lists)).data, 0)
    assert all_captions(pairs) == ["", "a1", "b"]


def test_whole_numbers_are_captions(data, make_config):
    def numbers(rows):
        for row in rows:
            row["caption"] = 3

    pairs = open_pairs(make_config(train_data_dir=data(numbers)).data, 0)
    assert all_captions(pairs) == ["", "3"]


def test_work_is_there_or_not():
    nothing = np.array([], dtype=np.int64)
    assert not Work(nothing, [])
    assert Work(nothing, [""])
    assert Work(np.array([0]), [])

"""The loader from a cache against the loader from images: the same pairs at the same places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdpo.common.precision import DTYPES
from sdpo.data.latents.encoder import CachedEncoder, build_encoder
from sdpo.data.latents.pairs import ROW
from sdpo.data.loader import PairLoader
from sdpo.data.order import Place
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import noise_pairs

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def data(pairs_dir, tmp_path_factory):
    """20 pairs, two of them broken, with lists of captions."""
    rows = pq.read_table(min(pairs_dir.glob("train-*.parquet"))).to_pylist()[:20]
    for i, row in enumerate(rows):
        row["caption"] = [row["caption"], f"{row['caption']} again"]
        if i in (5, 11):
            row["jpg_0"], row["label_0"] = b"broken", 1.0
    path = tmp_path_factory.mktemp("listed")
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")
    return path


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def ready(request, prepare, data, tiny_sd15, tiny_sdxl, tmp_path_factory):
    """A cache of `data` in float32 and what belongs to it."""
    from e2e.harness import as_argv

    from sdpo.config import parse_train

    sdxl = request.param == "sdxl"
    flags = {
        "pretrained_model_name_or_path": tiny_sdxl if sdxl else tiny_sd15,
        "sdxl": sdxl,
        "train_data_dir": data,
        "output_dir": tmp_path_factory.mktemp("run"),
        "resolution": 32,
        "train_batch_size": 3,
        "proportion_empty_prompts": 0.3,
        "max_bad_fraction": 1.0,
        "cache_dir_latents": tmp_path_factory.mktemp("latents"),
        "cache_dtype": "fp32",
    }
    return prepare(parse_train(as_argv(flags)))


def batches(ready, count, cache=None, config=None, **kwargs):
    loader = PairLoader(
        ready.pairs, config or ready.config, **{"rank": 0, "world_size": 1, **kwargs}, cache=cache
    )
    found = iter(loader)
    return [next(found) for _ in range(count)]


def changed(ready, **flags):
    return replace(ready.config, data=replace(ready.config.data, **flags))


def encoder(ready, cache=None):
    return build_encoder(ready.family, ready.source, 32, CPU, torch.float32, cache)


def test_the_same_inputs_as_from_images(ready):
    plain, cached = encoder(ready), encoder(ready, ready.cache)
    assert isinstance(plain, ModelEncoder)
    assert isinstance(cached, CachedEncoder)
    both = zip(batches(ready, 12), batches(ready, 12, ready.cache), strict=True)
    seen = {"bad": 0, "flipped": 0, "empty": 0}
    for one, other in both:
        assert one.keys == other.keys
        assert one.bad_rows == other.bad_rows
        assert one.place == other.place
        assert len(one) == len(other) == 3
        assert plain.latent_shape(one) == cached.latent_shape(other)
        a, b = (noise_pairs(e, x, 0.1, 0.1) for e, x in ((plain, one), (cached, other)))
        torch.testing.assert_close(a.noisy, b.noisy, rtol=1e-6, atol=1e-6)
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.timesteps, b.timesteps)
        torch.testing.assert_close(a.conditions, b.conditions)
        assert {k: v.dtype for k, v in a.conditions.items()} == {
            k: v.dtype for k, v in b.conditions.items()
        }
        seen["bad"] += len(one.bad_rows)
        seen["empty"] += one.captions.count("")
        seen["flipped"] += sum(map(flips, one.keys))
    assert min(seen.values()) > 0
    assert seen["flipped"] < 36


def flips(key):
    from sdpo.data.transforms import PairTransform

    return PairTransform(32).flips(key)


def test_labels_of_a_scorer(ready):
    """Images are kept by side, so that other labels make another winner of the same encoding."""
    labels = np.asarray(ready.pairs.rows.select_columns(["label_0"])["label_0"][:])
    turned = replace(ready.pairs, labels=1.0 - labels)
    loaders = [
        PairLoader(pairs, ready.config, 0, 1, cache=ready.cache) for pairs in (ready.pairs, turned)
    ]
    one, other = (next(iter(loader)) for loader in loaders)
    assert torch.equal(one.moments.roll(3, 0), other.moments)
    assert not torch.equal(one.moments, other.moments)


def test_without_flips(ready):
    (batch,) = batches(ready, 1, ready.cache, changed(ready, no_hflip=True))
    (plain,) = batches(ready, 1, ready.cache)
    same = [torch.equal(a, b) for a, b in zip(batch.moments[:3], plain.moments[:3], strict=True)]
    assert same == [not flips(key) for key in plain.keys]


def test_places_workers_and_processes(ready):
    whole = batches(ready, 4, ready.cache)
    later = batches(ready, 2, ready.cache, start=Place(*whole[2].place))
    for one, other in zip(whole[2:], later, strict=True):
        assert torch.equal(one.moments, other.moments)
        assert one.keys == other.keys
    by_workers = batches(ready, 4, ready.cache, changed(ready, dataloader_num_workers=2))
    for one, other in zip(whole, by_workers, strict=True):
        assert torch.equal(one.moments, other.moments)
        assert one.text.keys() == other.text.keys()
        assert all(torch.equal(one.text[k], other.text[k]) for k in one.text)
    second = batches(ready, 1, ready.cache, rank=1, world_size=2)[0]
    assert torch.equal(second.moments, whole[1].moments)


def test_no_image_is_read(ready):
    loader = PairLoader(ready.pairs, ready.config, 0, 1, cache=ready.cache)
    (number, row) = next(loader._loader.dataset._candidates((0, 0, 0)))
    assert row.keys() == {"label_0", "caption", ROW}
    assert row[ROW] == number


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_bf16_moves_latents_by_its_rounding(ready, precision):
    """|error| of a latent is at most scaling factor x 2^-8 x (|mean| + std |noise|)."""
    dtype = DTYPES[precision]
    cached = build_encoder(ready.family, ready.source, 32, CPU, dtype, ready.cache)
    (batch,) = batches(ready, 1, ready.cache)
    noise = torch.randn(6, *cached.latent_shape(batch), generator=torch.Generator().manual_seed(0))
    exact = cached.latents(batch, noise)
    rounded = cached.latents(replace(batch, moments=batch.moments.bfloat16()), noise)
    mean, std = batch.moments.unbind(1)
    bound = cached.vae["scaling_factor"] * 2**-8 * (mean.abs() + std * noise.abs())
    error = (exact - rounded).abs()
    assert (error <= bound + 1e-7).all()
    assert error.max() > 0
    assert exact.dtype == rounded.dtype == torch.float32
    assert all(v.dtype == dtype for v in cached.conditions(batch).values())

"""--resize bucket from a cache: encodings of several shapes, the same inputs as from the images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.data.latents.encoder import build_encoder
from sdpo.data.loader import PairLoader
from sdpo.models.forward import noise_pairs

SIZES = [(96, 54), (40, 80), (64, 64), (100, 50), (70, 140)]
CPU = torch.device("cpu")


@pytest.fixture
def data(make_parquet):
    """Pairs of noise in several shapes, winner and loser of unlike sizes; row 3 is broken."""
    chance = np.random.default_rng(0)

    def image(width, height):
        pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    rows = []
    for i in range(15):
        width, height = SIZES[i % len(SIZES)]
        images = [image(width, height), image(2 * width, 2 * height)]
        if i == 3:
            images[1] = images[1][:-200]
        row = {"jpg_0": images[0], "jpg_1": images[1], "label_0": float(i % 2)}
        rows.append({**row, "caption": f"caption {i}"})
    return make_parquet(rows, shards=2)


@pytest.fixture(params=[False, True], ids=["sd15", "sdxl"])
def flags(request, data):
    return {
        "sdxl": request.param,
        "train_data_dir": data,
        "resize": "bucket",
        "resolution": 64,
        "train_batch_size": 2,
        "proportion_empty_prompts": 0.2,
        "max_bad_fraction": 1.0,
    }


def test_the_same_inputs_as_from_images(prepare, cache_config, flags):
    ready = prepare(cache_config(**flags))
    loaders = [PairLoader(ready.pairs, ready.config, 0, 1, cache=c) for c in (None, ready.cache)]
    plain, cached = (
        build_encoder(ready.family, ready.source, 64, CPU, torch.float32, c)
        for c in (None, ready.cache)
    )
    batches = [iter(loader) for loader in loaders]
    shapes = set()
    for _ in range(25):
        one, other = (next(each) for each in batches)
        assert one.keys == other.keys
        assert one.bad_rows == other.bad_rows
        assert torch.equal(one.sizes, other.sizes)
        assert torch.equal(one.preference, other.preference)
        a, b = noise_pairs(plain, one, 0.1, 0.1), noise_pairs(cached, other, 0.1, 0.1)
        torch.testing.assert_close(a.noisy, b.noisy, rtol=1e-5, atol=1e-5)
        assert torch.equal(a.target, b.target)
        torch.testing.assert_close(a.conditions, b.conditions)
        shapes.add(tuple(a.noisy.shape[1:]))
        if flags["sdxl"]:
            # What the model is told are the images' own sizes: winner and loser differ by 2.
            told = a.conditions["time_ids"]
            assert torch.equal(told, one.sizes.float())
            ratios = told[:2, :2] / told[2:, :2]
            assert all(ratio in (0.5, 2.0) for ratio in ratios.flatten().tolist())
            assert told[:, 4:].tolist() == [list(one.pixels.shape[2:])] * 4
    assert len(shapes) == 3
    assert loaders[0].counter.rows == loaders[1].counter.rows == {3}


def test_a_cache_of_squares_is_another(prepare, cache_config, data):
    flags = {"train_data_dir": data, "max_bad_fraction": 1.0}
    prepare(cache_config(**flags))
    with pytest.raises(UserError, match=r"--resize crop \(this run: bucket\)"):
        prepare(cache_config(**flags, resize="bucket"))


def test_a_cache_is_completed(prepare, cache_config, data):
    """Rows that were left out before are encoded in their shapes, the others not again."""
    flags = {"train_data_dir": data, "max_bad_fraction": 1.0, "resize": "bucket"}
    some = prepare(cache_config(**flags, max_train_samples=6)).cache
    whole = prepare(cache_config(**flags)).cache
    kept = {(s.file, s.sha256) for s in some.shards if s.kind == "latents"}
    assert kept < {(s.file, s.sha256) for s in whole.shards if s.kind == "latents"}
    shapes = {tuple(whole.moments(row).shape[-2:]) for row in range(15) if row not in whole.bad}
    assert len(shapes) >= 3

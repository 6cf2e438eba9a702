"""The published bases, counted on the meta device, and the memory that is computed from them."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import memory
from scripts.bench.true_size import (
    BASES,
    build_denoiser,
    build_text_encoders,
    build_vae,
    call_on_meta,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", BASES)
def test_counts_are_the_published_ones(name):
    base = BASES[name]
    with torch.device("meta"):
        assert count(build_denoiser(name)) == base.parameters
        assert count(build_vae(name)) == base.vae_parameters


def test_text_encoders_are_the_published_ones():
    for name in ("sdxl", "sd3", "qwen-image", "z-image"):
        with torch.device("meta"):
            found = [count(encoder) for encoder in build_text_encoders(name)]
        assert found == [encoder.parameters for encoder in BASES[name].text]


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "z-image"])
def test_a_denoiser_predicts_on_the_meta_device(name):
    with torch.device("meta"), torch.no_grad():
        found = call_on_meta(name, build_denoiser(name), 256, 2, torch.float32)
    assert found.shape == (2, 16, 32, 32)


def test_what_divides_and_what_does_not():
    counted = memory.Counted("sd15", None)
    setting = memory.Setting("sd15", "AdamW", 1, True)
    n, largest = BASES["sd15"].parameters, counted.largest_unit
    frozen = 2 * (83_653_863 + 123_060_480)
    one = memory.bytes_by_part(counted, setting, 5)
    assert one == (4 * n, 2 * n, 4 * n, 8 * n, 2 * n, frozen, 5)
    eight = memory.bytes_by_part(counted, setting, 5, 8)
    assert eight == (n / 2 + 8 * largest, 2 * n, n / 2, n, 2 * n, frozen, 5)


def test_what_few_bits_save():
    counted = memory.Counted("sd15", 16)
    assert counted.held == BASES["sd15"].parameters and counted.linear < counted.held
    weights = {
        bits: memory.bytes_by_part(counted, memory.Setting("sd15", "AdamW", 1, True, 16, bits), 0)[
            0
        ]
        for bits in (16, 8, 4)
    }
    assert weights[16] - weights[8] == counted.linear
    assert weights[16] - weights[4] == pytest.approx(counted.linear * (2 - 4.5 / 8))
    # The adapters of rank 16 at attention's projections, in float32.
    assert weights[16] == 2 * counted.held + 4 * counted.trained

"""Caches of tiny models and pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def prepare():
    """`prepare(args)`: everything that train.py has once the cache of `args` is ready."""
    from accelerate import Accelerator
    from e2e.harness import _reset_accelerate

    from sdpo.data.latents.prepare import prepare_cache
    from sdpo.data.source import open_pairs
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource

    def run(args):
        family, source, pairs = get_family(args.sdxl), ModelSource.from_args(args), open_pairs(args)
        _reset_accelerate()
        try:
            cache = prepare_cache(pairs, args, family, source, Accelerator(cpu=True))
        finally:
            _reset_accelerate()
        return SimpleNamespace(args=args, family=family, source=source, pairs=pairs, cache=cache)

    return run


@pytest.fixture
def cache_args(make_args, tmp_path):
    """`cache_args(flag=value, ...)`: flags of a run from a cache in float32, at 32 px."""

    def make(**overrides):
        flags = {"cache_dir_latents": tmp_path / "latents", "cache_dtype": "fp32"}
        return make_args(**{**flags, "resolution": 32, **overrides})

    return make

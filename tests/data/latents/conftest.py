"""Caches of tiny models and pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def prepare():
    """`prepare(config)`: everything that train.py has once the cache of `config` is ready."""
    from accelerate import Accelerator
    from e2e.harness import _reset_accelerate

    from sdpo.data.latents.prepare import prepare_cache
    from sdpo.data.source import open_pairs
    from sdpo.models import open_base

    def run(config):
        family, source = open_base(config)
        pairs = open_pairs(config.data, config.run.seed)
        _reset_accelerate()
        try:
            cache = prepare_cache(pairs, config, family, source, Accelerator(cpu=True))
        finally:
            _reset_accelerate()
        return SimpleNamespace(
            config=config, family=family, source=source, pairs=pairs, cache=cache
        )

    return run


@pytest.fixture
def cache_config(make_config, tmp_path):
    """`cache_config(flag=value, ...)`: flags of a run from a cache in float32, at 32 px."""

    def make(**overrides):
        flags = {"cache_dir_latents": tmp_path / "latents", "cache_dtype": "fp32"}
        return make_config(**{**flags, "resolution": 32, **overrides})

    return make

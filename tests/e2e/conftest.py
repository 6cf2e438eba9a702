"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import pytest

from .harness import FLAGS, Run, Trainer


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    """One `--cache_dir` for all runs, so that the pairs are converted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def train(tiny_sd15, tiny_sdxl, pairs_dir, datasets_cache, tmp_path_factory) -> Trainer:
    """Runs train.py on the tiny models and pairs."""
    scratch = tmp_path_factory.mktemp("stderr")
    return Trainer({"sd15": tiny_sd15, "sdxl": tiny_sdxl}, pairs_dir, datasets_cache, scratch)


@pytest.fixture(scope="session")
def one(train, tmp_path_factory) -> Run:
    """What one process trains, which those that divide the work are held against."""
    return train(tmp_path_factory.mktemp("one"), **FLAGS, train_batch_size=4)

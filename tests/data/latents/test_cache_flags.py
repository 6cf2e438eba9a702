"""What the cache's flags do not go with."""

from __future__ import annotations

import pytest

from sdpo.common.errors import UserError
from sdpo.data.latents.__main__ import parse


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"streaming": True}, "leave --streaming out"),
        ({"random_crop": True}, "leave --random_crop out"),
        ({"cache_batch_size": 0}, "--cache_batch_size must be at least 1"),
        ({"cache_dtype": "int8"}, "--cache_dtype"),
        ({"cache_dir_latents": None, "verify_cache": True}, "--verify_cache has no meaning"),
        ({"cache_dir_latents": __file__}, "exists and is not a directory"),
    ],
)
def test_mistakes(cache_config, flags, said):
    with pytest.raises(UserError, match=said):
        cache_config(**flags)


def test_defaults(make_config):
    data = make_config().data
    assert (data.cache_dir_latents, data.cache_dtype, data.verify_cache) == (None, "bf16", False)


def test_home(cache_config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = cache_config(cache_dir_latents="~/latents").data
    assert data.cache_dir_latents == str(tmp_path / "latents")


def test_the_program_takes_a_training_runs_flags(tiny_sd15, pairs_dir, tmp_path):
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir]
    flags += ["--beta_dpo", 3, "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError, match="--cache_dir_latents is missing"):
        parse(list(map(str, flags)))
    config = parse([*map(str, flags), "--cache_dir_latents", "here", "--check_only"])
    assert config.run.check_only
    assert config.data.resolution == 64  # the base's own

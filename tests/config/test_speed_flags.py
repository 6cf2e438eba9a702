"""Flags of a step's speed: which exclude each other, and what is missing."""

from __future__ import annotations

import importlib.util

import pytest

from sdpo.common.errors import UserError
from sdpo.config import parse_train
from sdpo.training import places

NAMES = ("channels_last", "compile", "fused_optimizer", "use_8bit_adam")


def test_defaults_and_taking_them_back(make_config):
    optim = make_config().optim
    assert [getattr(optim, name) for name in NAMES] == [False, False, None, False]
    argv = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--no-fused_optimizer"]
    assert parse_train(argv).optim.fused_optimizer is False
    optim = make_config(**{name: True for name in NAMES[:3]}).optim
    assert [getattr(optim, name) for name in NAMES[:3]] == [True] * 3


@pytest.mark.parametrize("name", ["use_8bit_adam", "fused_optimizer"])
def test_adafactor_is_another_optimizer(make_config, name):
    with pytest.raises(UserError, match=f"--{name} .* --use_adafactor"):
        make_config(use_adafactor=True, **{name: True})


def test_where_adamw_is_not_torch_s_the_default_asks_nothing(make_config):
    assert make_config(use_adafactor=True).optim.fused_optimizer is None


def test_eight_bit_is_fused_already(make_config):
    with pytest.raises(UserError, match="leave --fused_optimizer out"):
        make_config(use_8bit_adam=True, fused_optimizer=True)


def test_a_missing_bitsandbytes_is_named(make_config, monkeypatch):
    found = importlib.util.find_spec
    absent = lambda name: None if name == "bitsandbytes" else found(name)  # noqa: E731
    monkeypatch.setattr(places, "find_spec", absent)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        make_config(use_8bit_adam=True)

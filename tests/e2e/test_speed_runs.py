"""Whole runs with the options of a step's speed, against plain ones."""

from __future__ import annotations

import pytest
import torch

from .harness import base_unet, identical

BETA = 500.0
# A float32 sum in another order changes a mean squared error in its last digits. The loss sees
# beta / 2 times the change of the margin, which is made of four of them.
ERROR = 2e-6
LOSS = 0.5 * BETA * 4 * ERROR
# Adam's first steps are the sign of the gradient times the rate, so that a rounding error can turn
# the few weights whose gradient is about zero; of the whole update, as a length, that is little.
SHARE = 0.02


def share_apart(run, plain, model):
    """How far two runs' weights are apart, as a share of how far training moved them."""
    base, one, other = base_unet(model), run.unet(), plain.unet()
    apart = sum((one[k] - other[k]).square().sum() for k in base)
    moved = sum((other[k] - base[k]).square().sum() for k in base)
    return (apart / moved).sqrt().item()


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """Runs without options, by family."""
    made = {}
    for name in ("sd15", "sdxl"):
        out = tmp_path_factory.mktemp(f"plain-{name}")
        made[name] = train(out, beta_dpo=BETA, sdxl=name == "sdxl")
    return made


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("sd15", {"channels_last": True}),
        ("sdxl", {"channels_last": True}),
        ("sd15", {"no-fused_optimizer": True}),
        ("sd15", {"channels_last": True, "no-fused_optimizer": True}),
    ],
    ids=str,
)
def test_same_losses(train, plain, tmp_path, family, flags):
    run = train(tmp_path / "run", beta_dpo=BETA, sdxl=family == "sdxl", **flags)
    for name in ("winner_mse", "loser_mse", "ref_winner_mse", "ref_loser_mse"):
        assert run.column(name) == pytest.approx(plain[family].column(name), rel=ERROR)
    assert run.column("loss") == pytest.approx(plain[family].column("loss"), abs=LOSS)
    assert share_apart(run, plain[family], train.models[family]) < SHARE
    kernel = run.config["resolved"]["fused_optimizer"]
    assert kernel is ("no-fused_optimizer" not in flags)
    assert all(tensor.is_contiguous() for tensor in run.unet().values())


def test_compiled_run_saves_resumes_and_exports_plain_names(train, plain, tmp_path, monkeypatch):
    compiled = []

    def as_it_is(function, **_):
        compiled.append(type(function.__self__).__name__)
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    train(tmp_path / "run", beta_dpo=BETA, compile=True, max_train_steps=2)
    resumed = train(tmp_path / "run", beta_dpo=BETA, compile=True)
    assert compiled == ["UNet2DConditionModel"] * 4
    assert identical(resumed.unet(), plain["sd15"].unet())
    from diffusers import UNet2DConditionModel

    exported = UNet2DConditionModel.from_pretrained(resumed.out / "pipeline", subfolder="unet")
    assert identical(exported.state_dict(), resumed.unet())


def test_resuming_with_the_other_memory_order_and_kernel(train, plain, tmp_path):
    old = {"no-fused_optimizer": True}
    train(tmp_path / "run", beta_dpo=BETA, max_train_steps=2, **old)
    run = train(tmp_path / "run", beta_dpo=BETA, channels_last=True)
    assert run.column("loss") == pytest.approx(plain["sd15"].column("loss"), abs=LOSS)
    assert share_apart(run, plain["sd15"], train.models["sd15"]) < SHARE

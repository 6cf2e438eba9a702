"""The README is short, and its example runs; test_docs.py checks what it names."""

from __future__ import annotations

import re

import pytest
import torch


@pytest.fixture(scope="module")
def readme(repo):
    return (repo / "README.md").read_text(encoding="utf-8")


def test_is_a_front_door(repo, readme):
    assert len(readme.splitlines()) <= 180
    # Every page is one link away, and so is the picture.
    for page in (repo / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name
    assert "(assets/quickstart/curves.png)" in readme


def test_example_runs(readme):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "preference_loss" in code
    assert "loser_scale" in code
    torch.manual_seed(0)
    ref_pred, noise = torch.randn(2, 4, 4, 8, 8)
    # Far from the reference the sigmoid is flat, and the gradient may be 0.
    model_pred = (ref_pred + 1e-3 * torch.randn(4, 4, 8, 8)).requires_grad_()
    logged = []
    names = {"model_pred": model_pred, "ref_pred": ref_pred, "noise": noise, "log": logged.append}
    names |= {"pred_w": model_pred[:2], "pred_l": model_pred[2:]}
    names |= {"noise_w": noise[:2], "noise_l": noise[2:]}
    exec(code, names)
    assert model_pred.grad.abs().sum() > 0
    assert names["scale"].shape == (2,)
    assert not names["scale"].requires_grad
    (metrics,) = logged
    for name in re.findall(r"# (winner_drift.*), \.\.\.", code)[0].split(", "):
        assert name in metrics

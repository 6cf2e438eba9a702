"""Diffusion-DPO's own properties; its values are checked in test_preference_loss.py."""

from __future__ import annotations

import math

import loss_reference as reference
import pytest
import torch

from sdpo import preference_loss


def test_starts_at_log_two():
    pred, _, target = reference.tensors(4)
    output = preference_loss("diffusion-dpo", pred, pred.clone(), target, beta=5000)
    assert output.loss.item() == pytest.approx(math.log(2), rel=1e-14)


def test_worked_example():
    # One pixel a sample: L = (0.25, 1), Lref = (1, 0.25), so delta = -1.5 and u = 0.75 beta.
    target = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    pred = torch.tensor([0.5, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    ref = torch.tensor([1.0, 0.5], dtype=torch.float64).reshape(2, 1, 1, 1)
    output = preference_loss("diffusion-dpo", pred, ref, target, beta=2.0)
    assert output.loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-14)
    assert output.metrics["margin"].item() == pytest.approx(-1.5)


def test_gradient_lowers_the_winners_error_and_raises_the_losers():
    pred, ref, target = reference.tensors(3)
    leaf = pred.clone().requires_grad_()
    preference_loss("diffusion-dpo", leaf, ref, target, beta=3.0).loss.backward()
    along_w, along_l = (leaf.grad * (pred - target)).flatten(1).sum(1).chunk(2)
    assert (along_w > 0).all()
    assert (along_l < 0).all()
    # The gradient at sample i is -+ beta (1 - sigmoid(u)) r / (pairs * pixels).
    us = reference.logits(pred.numpy(), ref.numpy(), target.numpy(), 3.0)
    for i, u in enumerate(us):
        size = 3.0 * (1 - reference.sigmoid(u)) / (3 * pred[0].numel())
        torch.testing.assert_close(leaf.grad[i], size * (pred - target)[i])
        torch.testing.assert_close(leaf.grad[3 + i], -size * (pred - target)[3 + i])


def test_alpha_and_form_play_no_part():
    tensors = reference.tensors(2)
    plain = preference_loss("diffusion-dpo", *tensors, beta=2.0).loss
    other = preference_loss("diffusion-dpo", *tensors, beta=2.0, alpha=0.3, form="sdxl").loss
    assert torch.equal(plain, other)

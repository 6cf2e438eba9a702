"""SFT: the winners' squared error and nothing else."""

from __future__ import annotations

import loss_reference as reference
import pytest
import torch

from sdpo import preference_loss
from sdpo.losses.preference import get_method


def test_value_is_diffusers_usual_mse_on_the_winners():
    pred, ref, target = reference.tensors(4)
    output = preference_loss("sft", pred, ref, target, beta=5000)
    want = torch.nn.functional.mse_loss(pred[:4], target[:4])
    assert output.loss.item() == pytest.approx(want.item(), rel=1e-14)


@pytest.mark.parametrize("mu", [None, 0.5])
def test_losers_get_no_gradient(mu):
    pred, ref, target = reference.tensors(3)
    leaf = pred.clone().requires_grad_()
    preference_loss("sft", leaf, ref, target, beta=5.0, mu=mu).loss.backward()
    assert torch.equal(leaf.grad[3:], torch.zeros_like(leaf.grad[3:]))
    torch.testing.assert_close(leaf.grad[:3], 2 * (pred - target)[:3] / pred[:3].numel())


def test_reference_and_beta_play_no_part_in_the_loss():
    pred, ref, target = reference.tensors(3)
    one = preference_loss("sft", pred, ref, target, beta=1.0).loss
    other = preference_loss("sft", pred, ref + 1, target, beta=100.0).loss
    assert torch.equal(one, other)


def test_only_sft_says_that_it_has_no_losers():
    flags = {
        name: getattr(get_method(name), "USES_LOSERS", True)
        for name in ("diffusion-dpo", "dspo", "dmpo", "sft")
    }
    assert flags == {"diffusion-dpo": True, "dspo": True, "dmpo": True, "sft": False}

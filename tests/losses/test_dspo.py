"""DSPO's own properties: its two forms and the SDXL form's two branches."""

from __future__ import annotations

import loss_reference as reference
import pytest
import torch

from sdpo import preference_loss


def at_distance(mean_square, dtype=torch.float64):
    """Tensors whose d = pred_w - ref_w has the given mean square, constant per pixel."""
    pred, ref, target = reference.tensors(2, dtype=dtype)
    ref[:2] = pred[:2] - mean_square**0.5
    return pred, ref, target


def test_worked_example_sd15():
    # r_w = 0.5, d = -0.5, u = 0.75 beta: with beta 2 the term is (0.5 + (1 - sigmoid(1.5)))^2.
    target = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    pred = torch.tensor([0.5, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    ref = torch.tensor([1.0, 0.5], dtype=torch.float64).reshape(2, 1, 1, 1)
    output = preference_loss("dspo", pred, ref, target, beta=2.0)
    assert output.loss.item() == pytest.approx((0.5 + reference.sigmoid(-1.5)) ** 2, rel=1e-14)


def test_small_beta_is_nearly_the_winners_error():
    tensors = reference.tensors(4)
    output = preference_loss("dspo", *tensors, beta=1e-6)
    assert output.loss.item() == pytest.approx(output.metrics["winner_mse"].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdxl_branch_changes_at_a_tenth(dtype):
    near, far = at_distance(0.0999, dtype), at_distance(0.1001, dtype)
    for tensors, branch in ((near, "near"), (far, "far")):
        us = reference.logits(*(x.double().numpy() for x in tensors), beta=2.0)
        lost = [reference.sigmoid(-u) ** 2 for u in us]
        want = sum(lost) / 2 * (1.0 if branch == "near" else 0.1001)
        found = preference_loss("dspo", *tensors, beta=2.0, form="sdxl").loss.item()
        assert found == pytest.approx(want, rel=1e-4)


def test_sdxl_switch_includes_the_tenth_itself():
    # d = 1 on a tenth of the pixels and 0 elsewhere: the mean of d^2 is float32's 0.1.
    target = torch.zeros(2, 1, 1, 10)
    pred = torch.zeros(2, 1, 1, 10)
    pred[0, 0, 0, 0] = 1.0
    output = preference_loss("dspo", pred, torch.zeros_like(pred), target, beta=1.0, form="sdxl")
    u = -0.5 * 0.1
    mean_square = pred[:1].square().mean()
    branch = mean_square.item() if mean_square >= 0.1 else 1.0
    assert mean_square >= 0.1
    assert output.loss.item() == pytest.approx(reference.sigmoid(-u) ** 2 * branch, rel=1e-5)


def test_sdxl_branch_is_chosen_by_the_batch_not_the_pair():
    pred, ref, target = at_distance(0.05)
    ref[0] = pred[0] - 0.5  # mean of 0.25 and 0.05: beyond the switch for both pairs
    us = reference.logits(pred.numpy(), ref.numpy(), target.numpy(), beta=2.0)
    want = (reference.sigmoid(-us[0]) ** 2 * 0.25 + reference.sigmoid(-us[1]) ** 2 * 0.05) / 2
    found = preference_loss("dspo", pred, ref, target, beta=2.0, form="sdxl").loss.item()
    assert found == pytest.approx(want, rel=1e-12)


def test_the_loser_enters_through_u():
    pred, ref, target = reference.tensors(2)
    for form in ("sd15", "sdxl"):
        leaf = pred.clone().requires_grad_()
        preference_loss("dspo", leaf, ref, target, beta=2.0, form=form).loss.backward()
        assert leaf.grad[2:].abs().max() > 0

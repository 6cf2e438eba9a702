"""Learning rates, optimizers and schedules as the recipes name them."""

from __future__ import annotations

import copy

import pytest
import torch

from sdpo.training.optim import build_optimizer, build_scheduler, restore, scaled_learning_rate


def parameter():
    return torch.nn.Parameter(torch.ones(3, 4))


def test_scaled_rate_is_per_pair(make_config):
    recipe = {"train_batch_size": 8, "gradient_accumulation_steps": 32, "learning_rate": 1e-8}
    assert scaled_learning_rate(make_config(**recipe, scale_lr=True).optim, 8) == pytest.approx(
        2048e-8
    )
    assert scaled_learning_rate(make_config(**recipe).optim, 8) == 1e-8


def test_adamw_takes_the_flags(make_config):
    config = make_config(
        adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.3, adam_epsilon=1e-6
    ).optim
    optimizer = build_optimizer(iter([parameter()]), config, 0.25)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"]) == (0.25, (0.8, 0.95))
    assert (group["weight_decay"], group["eps"]) == (0.3, 1e-6)


def test_adamw_first_step(make_config):
    # Bias correction makes the first step lr * sign(gradient), after decay by lr * weight_decay.
    weight = parameter()
    optimizer = build_optimizer([weight], make_config(adam_weight_decay=0.1).optim, 0.01)
    weight.grad = torch.full_like(weight, -5.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 1 - 0.001 + 0.01))


def test_adafactor_settings(make_config):
    config = make_config(use_adafactor=True, adam_weight_decay=0.3).optim
    optimizer = build_optimizer([parameter()], config, 0.25)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == "Adafactor"
    want = {
        "lr": 0.25,
        "weight_decay": 0.3,
        "clip_threshold": 1.0,
        "scale_parameter": False,
        "relative_step": False,
        "warmup_init": False,
    }
    assert {k: group[k] for k in want} == want


def test_adafactor_steps_at_the_rate_given_whatever_the_parameters_size(make_config):
    # Clipped at root mean square 1, a uniform gradient moves every weight by the rate.
    for size in (1.0, 100.0):
        weight = torch.nn.Parameter(torch.full((3, 4), size))
        config = make_config(use_adafactor=True, adam_weight_decay=0).optim
        optimizer = build_optimizer([weight], config, 0.01)
        weight.grad = torch.full_like(weight, 7.0)
        optimizer.step()
        torch.testing.assert_close(
            size - weight.detach(), torch.full((3, 4), 0.01), rtol=1e-3, atol=1e-5
        )


def rates(config, steps, total):
    optimizer = build_optimizer([parameter()], config, 1.0)
    scheduler = build_scheduler(optimizer, config, total)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_counts_optimizer_steps(make_config):
    config = make_config(lr_scheduler="constant_with_warmup", lr_warmup_steps=4).optim
    assert rates(config, 7, 100) == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1])
    # Neither processes nor accumulation change it.
    config = make_config(lr_warmup_steps=4, gradient_accumulation_steps=8, train_batch_size=4).optim
    assert rates(config, 5, 100) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_schedules_end_with_the_run(make_config):
    linear = rates(make_config(lr_scheduler="linear").optim, 11, 10)
    assert linear == pytest.approx([1 - i / 10 for i in range(11)])
    cosine = rates(make_config(lr_scheduler="cosine").optim, 11, 10)
    assert cosine[5] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0, abs=1e-12)
    assert rates(make_config(lr_scheduler="constant").optim, 3, 10) == [1.0] * 3


@pytest.mark.parametrize("adafactor", [False, True])
def test_state_round_trip_goes_on_identically(make_config, adafactor):
    config = make_config(use_adafactor=adafactor, lr_scheduler="linear").optim

    def make(weight):
        optimizer = build_optimizer([weight], config, 0.1)
        return optimizer, build_scheduler(optimizer, config, 10)

    def step(weight, optimizer, scheduler, i):
        weight.grad = torch.sin(torch.arange(12.0).reshape(3, 4) + i)
        optimizer.step()
        scheduler.step()

    whole = parameter()
    trained = make(whole)
    for i in range(3):
        step(whole, *trained, i)
    resumed = torch.nn.Parameter(whole.detach().clone())
    restored = make(resumed)
    saved = {"optimizer": trained[0].state_dict(), "scheduler": trained[1].state_dict()}
    # As a checkpoint does; in memory both optimizers would share their moments.
    restore(*restored, copy.deepcopy(saved))
    for i in range(3, 6):
        step(whole, *trained, i)
        step(resumed, *restored, i)
    assert torch.equal(whole, resumed)
    assert restored[1].get_last_lr() == trained[1].get_last_lr() == pytest.approx([0.04])

"""The moving average: its recursion, its swap, and which steps count."""

from __future__ import annotations

import pytest
import torch

from sdpo.models.ema import Ema


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def move(model, step):
    rng = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng))


def averaged(model, ema):
    with ema.applied():
        return [p.detach().clone() for p in model.parameters()]


def test_recursion(model):
    """Written out in float64: d_n = min(decay, n / (9 + n)), and 0 for the first."""
    ema = Ema(model, decay=0.3)
    want = model[1].weight.detach().double()
    decays = []
    for n in range(1, 9):
        move(model, n)
        ema.update()
        decay = 0.0 if n == 1 else min(0.3, n / (9 + n))
        decays.append(decay)
        want = decay * want + (1 - decay) * model[1].weight.detach().double()
        torch.testing.assert_close(averaged(model, ema)[2].double(), want, rtol=1e-5, atol=1e-6)
        assert ema.steps == n
    assert decays[1] < decays[2] < 0.3 == decays[-1]


def test_only_what_is_trained_is_kept(model):
    ema = Ema(model, decay=0.9)
    assert [p.shape for p in ema.model.shadow_params] == [p.shape for p in model[1].parameters()]
    assert not any(p.requires_grad for p in ema.model.shadow_params)


def test_swap_copies_nothing_and_comes_back(model):
    ema = Ema(model, decay=0.9)
    for n in range(1, 4):
        move(model, n)
        ema.update()
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    shadows = [p.data_ptr() for p in ema.model.shadow_params]
    with pytest.raises(KeyError), ema.applied():
        assert [p.data_ptr() for p in model[1].parameters()] == shadows
        assert not torch.equal(model[1].weight, before[2][1])
        raise KeyError
    for parameter, (pointer, value) in zip(model.parameters(), before, strict=True):
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)


def test_what_is_loaded_within_the_swap_is_the_average(model):
    ema = Ema(model, decay=0.9)
    move(model, 1)
    ema.update()
    move(model, 2)
    kept = model[1].weight.detach().clone()
    with ema.applied():
        state = {k: v + 1 for k, v in model.state_dict().items()}
        model.load_state_dict(state)
    ema.steps = 7
    assert torch.equal(averaged(model, ema)[2], state["1.weight"])
    assert torch.equal(model[1].weight, kept)
    # The eighth step's decay follows the count that was set.
    want = 8 / 17 * state["1.weight"] + 9 / 17 * kept
    ema.update()
    torch.testing.assert_close(averaged(model, ema)[2], want)

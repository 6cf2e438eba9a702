"""--lora_init in several processes, plain and under FSDP2: a file with layers of several ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.lora_file import kohya_name

from .harness import FLAGS, distance
from .test_sharding import ASKED

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def start(train, tmp_path_factory):
    """(the file, the UNet's weights that it makes of the base)."""
    family, base = get_family("sd15"), str(train.models["sd15"])
    rng, state = torch.Generator().manual_seed(0), {}
    unet = family.load_unet(ModelSource(base))
    layers = [(n, m) for n, m in unet.named_modules() if n.endswith(TARGETS)]
    for i, (name, module) in enumerate(layers):
        rank, stem = (4, 2)[i % 2], kohya_name(name)
        out, inputs = module.weight.shape
        state[f"{stem}.lora_down.weight"] = torch.randn(rank, inputs, generator=rng) * 0.2
        state[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=rng) * 0.2
        state[f"{stem}.alpha"] = torch.tensor(float(rank + 1))
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file(state, path)
    return path, family.load_unet(ModelSource(base, lora=str(path))).state_dict()


@pytest.fixture(scope="module")
def flags(start):
    more = {"lora_init": start[0], "lora_rank": 4, "lora_alpha": 5, "learning_rate": 1e-2}
    return {**FLAGS, **more, "max_train_steps": 2, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def alone(train, flags, tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), **flags, train_batch_size=4)


@pytest.mark.parametrize("environment", [{}, ASKED], ids=["gloo", "FSDP2"])
def test_two_processes_start_from_the_file_and_train_the_same(
    train, flags, alone, start, tmp_path, environment
):
    two = train.processes(tmp_path / "two", 2, environment, **flags, train_batch_size=2)
    assert two.metrics[0]["margin"] == two.metrics[0]["winner_drift"] == 0.0
    first = two.numbers[0]
    assert first["winner_mse"] == pytest.approx(alone.numbers[0]["winner_mse"], rel=1e-5)
    moved = distance(alone.unet(), start[1])
    assert moved > 1e-3
    assert distance(two.unet(), alone.unet()) < 0.01 * moved

"""What lives in the host's memory is on the device while it is asked, and says the same."""

from __future__ import annotations

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.pairs import PairBatch
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.offload import Offloaded

CPU = torch.device("cpu")


class Watched(torch.nn.Linear):
    """Notes where its weights are when it is called."""

    def forward(self, x):
        self.seen = [t.data_ptr() for t in (self.weight, self.bias, self.count)]
        return super().forward(x)


def test_weights_are_on_the_device_for_a_call_alone(monkeypatch):
    """A copy stands for what would be the device's."""
    module = Watched(3, 2).requires_grad_(False)
    module.register_buffer("count", torch.ones(2))
    tensors = [module.weight, module.bias, module.count]
    home = [t.data_ptr() for t in tensors]
    x = torch.randn(4, 3)
    want = module(x)
    assert module.seen == home
    offloaded = Offloaded(module, CPU)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    assert torch.equal(offloaded(x), want)
    assert set(module.seen).isdisjoint(home)
    assert [t.data_ptr() for t in tensors] == home
    with pytest.raises(RuntimeError):
        offloaded(torch.randn(4, 7))
    assert [t.data_ptr() for t in tensors] == home


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_text_encoders_are_on_the_device_while_captions_are_encoded(
    name, tiny_sd15, tiny_sd3, monkeypatch
):
    family, source = get_family(name), ModelSource(str(tiny_sd3 if name == "sd3" else tiny_sd15))
    batch = PairBatch(torch.zeros(4, 3, 32, 32), ["a red square", ""], [(0, 0, 0), (0, 0, 1)])
    want = ModelEncoder(family, family.load_frozen(source), 32, CPU).conditions(batch)
    encoder = ModelEncoder(family, family.load_frozen(source), 32, CPU, offload_text=True)
    weights = [p for model in encoder.frozen.text_encoders for p in model.parameters()]

    def places():
        return {p.data_ptr() for p in weights}

    home, seen, encode, moved = places(), [], family.encode_text, torch.Tensor.to

    def watched(*arguments):
        seen.append(places())
        return encode(*arguments)

    monkeypatch.setattr(family, "encode_text", watched)
    # A copy stands for what would be the device's.
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **options: moved(*a, **options).clone())
    found = encoder.conditions(batch)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)
    assert places() == home
    assert len(seen) == 1
    assert seen[0].isdisjoint(home)
    with encoder.frozen_parts() as frozen:
        assert frozen is encoder.frozen
        assert places().isdisjoint(home)
    assert places() == home


def test_it_has_no_meaning_with_a_cache(make_config, tmp_path):
    with pytest.raises(UserError, match="--offload_text_encoders has no meaning with --cache_dir"):
        make_config(offload_text_encoders=True, cache_dir_latents=tmp_path / "cache")

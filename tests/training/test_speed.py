"""Memory order, compilation, the optimizers' implementations, and what waits for the device."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo.common.errors import UserError
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.reference import make_reference
from sdpo.training.build import compile_forward, to_channels_last
from sdpo.training.optim import build_adamw, build_optimizer, follow_layout, restore

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def loaded(request, tiny_sd15, tiny_sdxl):
    """(UNet, encoder, UNet's inputs) of either family."""
    family = get_family(request.param)
    source = ModelSource(str(tiny_sdxl if family.sdxl else tiny_sd15))
    frozen = family.load_frozen(source)
    conditions = family.encode_captions(frozen, ["a red square", "", "x", "y"], 64)
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(4, 4, 16, 16, generator=draw),
        "timestep": torch.tensor([3, 900, 500, 40]),
        "encoder_hidden_states": conditions.pop("hidden"),
    }
    if conditions:
        inputs["added_cond_kwargs"] = conditions
    return family.load_unet(source), ModelEncoder(family, frozen, 64, CPU), inputs


def gradients(unet, inputs):
    unet.zero_grad()
    output = unet(**inputs).sample
    output.square().mean().backward()
    return output.detach(), {k: p.grad.clone() for k, p in unet.named_parameters()}


def test_channels_last_is_the_same_up_to_rounding(loaded):
    unet, encoder, inputs = copy.deepcopy(loaded)
    want, want_gradients = gradients(unet, inputs)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = encoder.frozen.vae.encode(pixels).latent_dist.mean
    to_channels_last(unet, encoder)
    weight = unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert not encoder.frozen.vae.encoder.conv_in.weight.is_contiguous()
    # A copy in half precision, as the reference is, keeps the order.
    assert not make_reference(unet, torch.bfloat16).conv_in.weight.is_contiguous()
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    found, found_gradients = gradients(unet, inputs)
    # Sums of some hundred float32 products in another order: a few units of 2^-24 of the largest.
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    for name, gradient in found_gradients.items():
        bound = 1e-4 * want_gradients[name].abs().max() + 1e-8
        assert (gradient - want_gradients[name]).abs().max() <= bound, name
    changed = encoder.frozen.vae.encode(pixels).latent_dist.mean
    assert (changed - latents).abs().max() <= 1e-5 * latents.abs().max()


def test_channels_last_with_a_cache_has_no_vae(loaded):
    unet = copy.deepcopy(loaded[0])
    to_channels_last(unet, types.SimpleNamespace())
    assert not unet.conv_in.weight.is_contiguous()


def test_channels_last_leaves_videos_alone():
    model = nn.ModuleList([nn.Conv3d(2, 2, 3), nn.Conv2d(2, 2, 3)])
    to_channels_last(model, types.SimpleNamespace())
    assert model[0].weight.is_contiguous() and not model[1].weight.is_contiguous()


class Counted:
    """Stands in for torch.compile: the same function, its calls counted by module."""

    def __init__(self):
        self.calls = []

    def __call__(self, function, **_):
        def called(*args, **kwargs):
            self.calls.append(function.__self__)
            return function(*args, **kwargs)

        return called


def test_compiling_wraps_nothing(monkeypatch, loaded):
    unet, _, inputs = copy.deepcopy(loaded)
    names, want = list(unet.state_dict()), unet(**inputs).sample
    reference = make_reference(unet, torch.float32)
    counted = Counted()
    monkeypatch.setattr(torch, "compile", counted)
    compile_forward(unet, reference)
    assert torch.equal(unet(**inputs).sample, want)
    assert torch.equal(reference(**inputs).sample, want)
    assert counted.calls == [unet, reference]
    assert list(unet.state_dict()) == names
    copied = copy.deepcopy(unet)
    copied(**inputs)
    assert counted.calls == [unet, reference]


def test_compiling_finds_the_module_of_a_reference(monkeypatch, loaded):
    unet = copy.deepcopy(loaded[0])
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function))
    held = make_reference(unet, torch.float32)
    compile_forward(unet, types.SimpleNamespace(module=held))
    assert [function.__self__ for function in compiled] == [unet, held]
    # Without a module of its own it is the UNet with adapters off, compiled with it.
    compiled.clear()
    compile_forward(unet, lambda *args: None)
    assert [function.__self__ for function in compiled] == [unet]


@pytest.mark.parametrize("loaded", ["sd15"], indirect=True)
def test_the_unet_is_one_graph(monkeypatch, loaded):
    unet, _, inputs = copy.deepcopy(loaded)
    want = unet(**inputs).sample
    real = torch.compile
    # Tracing without code generation: that takes minutes. A break in the graph is an error.
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend="eager", fullgraph=True))
    compile_forward(unet, None)
    assert torch.equal(unet(**inputs).sample, want)


def weights():
    draw = torch.Generator().manual_seed(1)
    shapes = [(8, 4, 3, 3), (16, 8), (7,)]
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def run(optimizer, parameters, first, last):
    for i in range(first, last):
        for parameter in parameters:
            values = torch.sin(torch.arange(float(parameter.numel())) * 3 + i)
            gradient = values.reshape(parameter.shape)
            # As autograd does it: the gradient in the order of its weight.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()


def with_kernel(make_config, fused):
    return dataclasses.replace(make_config().optim, fused_optimizer=fused)


def test_fused_adamw_is_the_default_and_is_adamw(make_config):
    plain, fused = weights(), weights()
    optimizer = build_adamw(plain, with_kernel(make_config, False), 1e-2)
    assert not optimizer.defaults["fused"]
    run(optimizer, plain, 0, 10)
    optimizer = build_adamw(fused, make_config().optim, 1e-2)
    assert optimizer.defaults["fused"] is True
    run(optimizer, fused, 0, 10)
    for a, b in zip(plain, fused, strict=True):
        # Ten steps of 0.01, each rounded in float32: 1e-6 of weights about 1.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("asked", "told"), [(None, "INFO"), (True, "WARNING")])
def test_without_a_fused_kernel_the_plain_one_is_used(
    make_config, monkeypatch, caplog, asked, told
):
    caplog.set_level("INFO")
    adamw = torch.optim.AdamW

    def refuses(parameters, fused=False, **settings):
        if fused:
            raise RuntimeError("`fused=True` requires a device that has it")
        return adamw(parameters, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", refuses)
    optimizer = build_adamw(weights(), with_kernel(make_config, asked), 1e-2)
    assert type(optimizer) is adamw and not optimizer.defaults["fused"]
    (record,) = caplog.records
    assert record.levelname == told
    assert "--fused_optimizer: AdamW without it" in record.getMessage()


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_resuming_in_another_memory_order_or_kernel(make_config, before, fused):
    whole, config = weights(), with_kernel(make_config, fused)
    optimizer = build_optimizer(whole, with_kernel(make_config, before), 1e-2)
    run(optimizer, whole, 0, 3)
    saved = {
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "scheduler": scheduler_of(optimizer).state_dict(),
    }
    resumed = [nn.Parameter(w.detach().clone()) for w in whole]
    resumed[0].data = resumed[0].data.contiguous(memory_format=torch.channels_last)
    again = build_optimizer(resumed, config, 1e-2)
    restore(again, scheduler_of(again), saved)
    for parameter, state in again.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    assert {bool(group["fused"]) for group in again.param_groups} == {fused}
    run(optimizer, whole, 3, 6)
    run(again, resumed, 3, 6)
    for a, b in zip(whole, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_eight_bit_moments_keep_their_order():
    parameter = weights()[0]
    optimizer = torch.optim.SGD([parameter])
    moments = torch.zeros(parameter.shape, dtype=torch.uint8)
    optimizer.state[parameter]["state1"] = moments.contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="--channels_last"):
        follow_layout(optimizer)


def test_eight_bit_adam_takes_the_flags(make_config, monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        """Stands in for bitsandbytes' own."""

    module = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    package = types.ModuleType("bitsandbytes")
    # find_spec, which the flags' check asks, wants one.
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    config = make_config(use_8bit_adam=True, adam_beta1=0.8, adam_epsilon=1e-6).optim
    optimizer = build_optimizer(weights(), config, 0.25)
    (group,) = optimizer.param_groups
    assert type(optimizer) is AdamW8bit
    assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.8, 0.999), 1e-6)


def test_a_broken_bitsandbytes_is_one_sentence(make_config, monkeypatch):
    config = dataclasses.replace(make_config().optim, use_8bit_adam=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="--use_8bit_adam: bitsandbytes cannot be imported"):
        build_adamw(weights(), config, 1e-2)


class HostReads(TorchDispatchMode):
    """Counts `.item()`, `float(tensor)`, `bool(tensor)` and the like: on a GPU each would wait."""

    def __init__(self):
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and not self.paused:
            self.count += 1
        return function(*args, **(kwargs or {}))

    def without(self, function, *args):
        self.paused = True
        try:
            return function(*args)
        finally:
            self.paused = False


def host_reads(tmp_path, monkeypatch, make_config, accumulation):
    """How often a step of a real run reads the device, the draws on the host left out."""
    from e2e.harness import as_argv, run_here

    import sdpo.training.step
    from sdpo.training.run import Run

    reads = HostReads()
    steps, noise_pairs = Run.steps, sdpo.training.step.noise_pairs

    def on_the_host(batches):
        while True:
            yield reads.without(next, batches)

    def counted(run):
        for step in steps(run):
            step.batches = on_the_host(step.batches)
            with reads:
                yield step

    def undisturbed(*args):
        return reads.without(noise_pairs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", counted)
        patch.setattr(sdpo.training.step, "noise_pairs", undisturbed)
        flags = make_config(output_dir=tmp_path / f"run-{accumulation}").flags()
        names = ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "report_to")
        kept = {name: flags[name] for name in names}
        kept |= {"resolution": 32, "train_batch_size": 1, "max_train_steps": 1}
        kept |= {"gradient_accumulation_steps": accumulation, "use_winner_preserving": True}
        kept |= {"cache_dir": tmp_path / "cache"}
        assert run_here("train.py", as_argv(kept)) == 0
    return reads.count


def test_micro_steps_do_not_wait_for_the_device(tmp_path, monkeypatch, make_config):
    one = host_reads(tmp_path, monkeypatch, make_config, 1)
    four = host_reads(tmp_path, monkeypatch, make_config, 4)
    assert one > 0
    assert four == one

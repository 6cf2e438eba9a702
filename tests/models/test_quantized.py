"""A base in 8 or 4 bits: near the original by a stated bound, as small as promised, never trained,
and the same to reference and trained model."""

from __future__ import annotations

import copy
import importlib.util
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sdpo.common.errors import UserError
from sdpo.data.pairs import PairBatch
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import noise_pairs, predict, predict_reference
from sdpo.models.lora import AdaptersOff, add_adapters, save_adapters
from sdpo.models.quantized import (
    QuantizedLinear,
    quantize_linear_layers,
    round_linear_layers,
)
from sdpo.training import places
from sdpo.training.sharding import launched_sharding

CPU = torch.device("cpu")
BITS = ["8bit", "4bit"]
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def linear(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def error_bound(weight, bits):
    """Half a step of int8 and what float16 rounds before; half of NF4's widest step, which is from
    -1 to -0.6961928 of a block's largest weight."""
    if bits == "8bit":
        largest = weight.abs().amax(1, keepdim=True)
        return (largest * (0.5 / 127 + 2**-11)).expand_as(weight)
    blocks = weight.flatten().split(64)
    largest = torch.cat([block.abs().max().expand(len(block)) for block in blocks])
    return largest.reshape(weight.shape) * (1 - 0.6961928) / 2 * (1 + 1e-5)


@installed
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(64, 128), (60, 34), (6, 3)])
def test_weights_are_near_and_small(bits, shape):
    plain = linear(*shape)
    layer = QuantizedLinear(plain, bits, torch.float32, CPU)
    assert layer.weight.shape == plain.weight.shape
    error = (layer.weight - plain.weight).abs()
    assert error.max() > 0
    assert (error <= error_bound(plain.weight, bits)).all()
    # Uniform within its step: 1 / (127 sqrt(12)) of the largest; NF4 as it was measured.
    relative = error.norm() / plain.weight.norm()
    assert relative < (0.01 if bits == "8bit" else 0.12)
    rounded = nn.Sequential(copy.deepcopy(plain))
    round_linear_layers(rounded, bits, CPU)
    assert torch.equal(rounded[0].weight, layer.weight)
    count, outputs = plain.weight.numel(), shape[1]
    promised = count + 4 * outputs if bits == "8bit" else -(-count // 2) + 4 * -(-count // 64)
    assert sum(t.nbytes for t in (layer.values, layer.scales)) == promised


@installed
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits):
    plain = linear(64, 8)
    plain.weight.zero_()
    assert not QuantizedLinear(plain, bits, torch.float32, CPU).weight.any()


@installed
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("half", [False, True])
def test_it_computes_what_a_plain_layer_of_its_weights_does(bits, half):
    """To the bit: output, the inputs' gradient, with and without autograd, in evaluation too."""
    dtype = torch.bfloat16 if half else torch.float32
    layer = QuantizedLinear(linear(64, 24), bits, dtype, CPU)
    plain = linear(64, 24).to(dtype)
    plain.weight.copy_(layer.weight)
    start = torch.randn(5, 7, 64)
    found = []
    for module in (plain, layer):
        x = start.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = module(x)
            with torch.no_grad():
                assert torch.equal(module.eval()(x), output)
        output.square().sum().backward()
        found.append((output.detach(), x.grad))
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@installed
@pytest.mark.parametrize("bits", BITS)
def test_the_backward_pass_keeps_no_weights(bits):
    layer = QuantizedLinear(linear(64, 48), bits, torch.float32, CPU)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), id):
        layer(torch.randn(2, 64, requires_grad=True))
    assert sorted(kept) == sorted(t.data_ptr() for t in (layer.values, layer.scales))


@installed
@pytest.mark.parametrize("bits", BITS)
def test_the_bits_are_those_of_bitsandbytes_own_layers(bits):
    """A base that diffusers loads in them for sampling is the one that was trained over."""
    import bitsandbytes as bnb

    plain = linear(64, 48)
    if bits == "8bit":
        theirs = bnb.nn.Int8Params(plain.weight.clone(), requires_grad=False).to("cpu")
        scales = theirs.SCB
    else:
        weight = plain.weight.clone()
        theirs = bnb.nn.Params4bit(weight, compress_statistics=False, quant_type="nf4").to("cpu")
        scales = theirs.quant_state.absmax
    layer = QuantizedLinear(plain, bits, torch.float32, CPU)
    assert torch.equal(layer.values, theirs.data)
    assert torch.equal(layer.scales, scales)


@pytest.fixture(scope="module", params=["sd15", "sd3"])
def base(request, tiny_sd15, repo):
    """(family, denoiser, inputs of 2 pairs); the SD3 is the trained one."""
    family = get_family(request.param)
    source = ModelSource(str(repo / "assets/tiny-sd3" if request.param == "sd3" else tiny_sd15))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = PairBatch(pixels, ["a red square", ""], [(0, 0, 0), (0, 0, 1)])
    encoder = ModelEncoder(family, family.load_frozen(source), 32, CPU)
    return family, family.load_unet(source), noise_pairs(encoder, batch)


@pytest.fixture
def adapted(base, make_config):
    """`adapted(dtype, ...flags)`: a copy of the denoiser with adapters, as a run starts."""

    def make(dtype=torch.float32, **flags):
        unet = copy.deepcopy(base[1])
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        config = make_config(lora_rank=2, **{"lora_target_modules": targets, **flags})
        add_adapters(unet, config.model, config.run.seed, dtype, CPU)
        return unet.train()

    return make


@installed
@pytest.mark.parametrize("flags", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_it_starts_at_margin_zero_and_trains_adapters_alone(base, adapted, bits, dtype, flags):
    family, _, inputs = base
    unet = adapted(dtype, quantize_base=bits, **flags)
    unet.enable_gradient_checkpointing()
    adapters = [p for p in unet.parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in unet.named_parameters() if not p.requires_grad}

    def autocast():
        return torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()

    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for step in range(3):
        reference = predict_reference(family, AdaptersOff(unet), inputs, autocast())
        with autocast():
            prediction = predict(family, unet, inputs)
        assert torch.equal(prediction, reference) == (step == 0)
        loss = (prediction.float() - inputs.target).square().mean()
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = dict(unet.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@installed
@pytest.mark.parametrize("bits", BITS)
def test_all_linear_layers_of_the_base_and_nothing_else(base, adapted, bits):
    family, _, inputs = base
    plain, unet = adapted(), adapted(quantize_base=bits)
    named = dict(unet.named_modules())
    changed = {n for n, module in named.items() if isinstance(module, QuantizedLinear)}
    kinds = {n: type(m) for n, m in plain.named_modules()}
    left = {n for n, kind in kinds.items() if kind is nn.Linear and ".lora_" not in n}
    assert changed == left
    assert all(type(named[n]) is kind for n, kind in kinds.items() if n not in changed)
    weights = [module.weight for n, module in plain.named_modules() if n in changed]
    held = sum(named[n].values.nbytes + named[n].scales.nbytes for n in changed)
    # Of float32: a quarter or an eighth, and scales, which in layers this narrow weigh more.
    assert held < sum(w.nbytes for w in weights) * (0.33 if bits == "8bit" else 0.145)
    reference = predict_reference(family, AdaptersOff(plain), inputs, nullcontext())
    found = predict_reference(family, AdaptersOff(unet), inputs, nullcontext())
    distance = (found - reference).norm() / reference.norm()
    assert 0 < distance < (0.02 if bits == "8bit" else 0.2)


@installed
def test_a_start_from_a_lora_file(base, adapted, tmp_path):
    family, _, inputs = base
    first = adapted()
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_adapters(first, tmp_path / "lora.safetensors")
    unet = adapted(quantize_base="4bit", lora_init=tmp_path / "lora.safetensors")
    reference = predict_reference(family, AdaptersOff(unet), inputs, nullcontext())
    assert torch.equal(predict(family, unet, inputs), reference)
    plain = adapted(quantize_base="4bit")
    assert not torch.equal(predict(family, plain, inputs), reference)


def test_it_needs_adapters_and_its_package(make_config, monkeypatch):
    monkeypatch.setattr(places, "find_spec", lambda name: name != "bitsandbytes" or None)
    with pytest.raises(UserError, match="--quantize_base has no meaning without --lora_rank"):
        make_config(quantize_base="8bit")
    with pytest.raises(UserError, match="--quantize_base needs the package bitsandbytes, which"):
        make_config(quantize_base="8bit", lora_rank=2)


def test_a_broken_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--quantize_base: bitsandbytes cannot be imported"):
        quantize_linear_layers(nn.Sequential(linear(2, 2)), "8bit", torch.float32, CPU)


def test_it_does_not_go_with_fsdp2(make_config, monkeypatch):
    monkeypatch.setattr(places, "find_spec", lambda name: True)
    config = make_config(quantize_base="4bit", lora_rank=2)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--quantize_base does not go with FSDP2"):
        launched_sharding(config)

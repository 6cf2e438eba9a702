"""Adapters: the same numbers as a full UNet with the product added to its weights, and one UNet."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdpo import preference_loss
from sdpo.common.errors import UserError
from sdpo.data.pairs import PairBatch
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import noise_pairs, predict, predict_reference
from sdpo.models.lora import (
    LORA_FILE,
    AdaptersOff,
    adapter_layers,
    add_adapters,
    has_adapters,
    load_adapters,
    merged_state,
    save_adapters,
    seed_dropout,
)
from sdpo.models.reference import make_reference

CPU = torch.device("cpu")
RANK, ALPHA = 4, 6.0
CONVOLUTIONS = ["to_q", "conv1", "ff.net.2"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, tiny_sd15, tiny_sdxl):
    """(family, source, UNet, inputs of 2 pairs) of either family."""
    family = get_family(request.param)
    source = ModelSource(str(tiny_sdxl if family.sdxl else tiny_sd15))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = PairBatch(pixels, ["a red square", ""], [(0, 0, 0), (0, 0, 1)])
    encoder = ModelEncoder(family, family.load_frozen(source), 32, CPU)
    return family, source, family.load_unet(source), noise_pairs(encoder, batch)


@pytest.fixture
def adapted(base, make_config):
    """`adapted(dtype, ...flags)`: a copy of the UNet with adapters, as a run starts."""

    def make(dtype=torch.float32, **flags):
        unet = copy.deepcopy(base[2])
        config = make_config(sdxl=base[0].sdxl, **{"lora_rank": RANK, "lora_alpha": ALPHA, **flags})
        add_adapters(unet, config.model, config.run.seed, dtype, CPU)
        return unet.train()

    return make


def trained(unet, size=0.3):
    """The adapters of `unet` moved at random, as if trained."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=rng))
    return unet


def merged(base, unet):
    """A plain UNet with W + (alpha / rank) B A, or DoRA's m V / |V|, in place of each W."""
    plain = copy.deepcopy(base[2])
    for layer_name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = plain.get_submodule(layer_name).weight
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        product = torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
        total = weight.double() + ALPHA / RANK * product
        if "default" in layer.lora_magnitude_vector:
            length = total.square().sum(tuple(range(1, total.ndim)), keepdim=True).sqrt()
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            total = magnitude.reshape(length.shape) * total / length
        with torch.no_grad():
            weight.copy_(total)
    return plain


LOSSES = [
    ("diffusion-dpo", {"beta": 5.0, "mu": 0.9, "scope": "batch"}),
    ("diffusion-dpo", {"beta": 5.0, "mu": 0.6, "scope": "pair"}),
    ("dspo", {"beta": 0.5, "mu": 0.2}),
    ("dmpo", {"beta": 2.0, "mu": 0.9, "alpha": 0.01}),
    ("sft", {"beta": 1.0}),
]


@pytest.mark.parametrize(
    "flags", [{}, {"use_dora": True}, {"lora_target_modules": CONVOLUTIONS}], ids=str
)
def test_losses_are_those_of_the_full_unet_with_the_product_added(base, adapted, flags):
    """Float32: the two paths differ by rounding, 1e-5 of the loss."""
    family, _, start, inputs = base
    unet = trained(adapted(**flags))
    full = merged(base, unet).train()
    reference = predict_reference(
        family, make_reference(start, torch.float32), inputs, nullcontext()
    )
    found_reference = predict_reference(family, AdaptersOff(unet), inputs, nullcontext())
    assert torch.equal(found_reference, reference)
    prediction, found = predict(family, full, inputs), predict(family, unet, inputs)
    assert (prediction - reference).abs().max() > 0.01
    for method, options in LOSSES:
        want = preference_loss(
            method, prediction, reference, inputs.target, form=family.name, **options
        )
        got = preference_loss(
            method, found, found_reference, inputs.target, form=family.name, **options
        )
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
        for name, value in want.metrics.items():
            assert float(got.metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_chain_rules(base, adapted, checkpointing):
    """dB = (alpha / rank) dW A^T and dA = (alpha / rank) B^T dW, dW that of the full UNet."""
    inputs = base[3]
    unet = trained(adapted())
    full = merged(base, unet).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    for model in (unet, full):
        reference = predict_reference(base[0], AdaptersOff(unet), inputs, nullcontext())
        output = preference_loss(
            "diffusion-dpo",
            predict(base[0], model, inputs),
            reference,
            inputs.target,
            beta=5.0,
            mu=0.9,
        )
        output.loss.backward()
    checked = 0
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        slope = ALPHA / RANK * full.get_submodule(name).weight.grad
        scale = slope.abs().max().item()
        torch.testing.assert_close(up.grad, slope @ down.T, rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(down.grad, up.T @ slope, rtol=1e-3, atol=1e-4 * scale)
        checked += up.grad.abs().max().item() > 0
    assert checked >= 8
    assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_a_run_starts_at_margin_zero_to_the_bit(base, adapted, dtype, dora):
    unet = adapted(dtype, use_dora=dora)
    inputs = base[3]

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

    with autocast():
        prediction = predict(base[0], unet, inputs)
    reference = predict_reference(base[0], AdaptersOff(unet), inputs, autocast())
    assert torch.equal(prediction, reference)
    # And it is the very output of the copy that a run without adapters is held against.
    copied = predict_reference(base[0], make_reference(base[2], dtype), inputs, autocast())
    assert torch.equal(reference, copied)
    trained(unet)
    assert torch.equal(predict_reference(base[0], AdaptersOff(unet), inputs, autocast()), copied)
    with autocast():
        assert not torch.equal(predict(base[0], unet, inputs), prediction)


def test_the_reference_leaves_no_trace(base, adapted):
    unet = adapted(lora_dropout=0.5)
    reference = AdaptersOff(unet)
    before = [(p.requires_grad, p.data_ptr()) for p in unet.parameters()]
    modes = [m.training for m in unet.modules()]
    seen = []
    handle = unet.conv_in.register_forward_hook(lambda *_: seen.append(unet.training))
    output = predict_reference(base[0], reference, base[3], nullcontext())
    handle.remove()
    assert seen == [False]
    assert not output.requires_grad
    assert [(p.requires_grad, p.data_ptr()) for p in unet.parameters()] == before
    assert [m.training for m in unet.modules()] == modes
    with pytest.raises(TypeError):
        reference("not a sample")
    assert unet.training
    assert not any(layer.disable_adapters for layer in adapter_layers(unet))


def test_one_unet_in_the_runs_dtype_and_small_adapters_in_float32(base, adapted):
    unet = adapted(torch.bfloat16)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    reference = make_reference(base[2], torch.bfloat16)
    kept = [p for p in unet.parameters() if not p.requires_grad]
    assert [p.dtype for p in kept] == [p.dtype for p in reference.parameters()]
    linear = [layer.get_base_layer() for layer in adapter_layers(unet)]
    want = sum(RANK * (part.in_features + part.out_features) for part in linear)
    assert sum(p.numel() for p in trainable) == want
    names = {name.split(".")[-1] for name, _ in unet.named_modules()}
    assert {"to_q", "to_k", "to_v"} <= names
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in unet.named_modules())
    assert len(linear) == 4 * attentions > 0


def test_first_values_are_a_function_of_the_seed(adapted):
    def values(*args, **flags):
        parts = adapted(*args, **flags).named_parameters()
        return {k: p.detach() for k, p in parts if p.requires_grad}

    first = values()
    torch.rand(7)
    for again in (values(), values(torch.bfloat16)):
        assert all(torch.equal(first[k], again[k]) for k in first)
    other = values(seed=3)
    for name, value in first.items():
        if ".lora_B." in name:
            assert value.abs().max() == 0
            continue
        assert not torch.equal(value, other[name])
        bound = value.shape[1] ** -0.5
        assert 0.5 * bound < value.abs().max() <= bound


def test_autocast_does_what_widening_the_inputs_would(base, adapted):
    """peft's widening of every input is off in half precision: equal outputs and gradients."""
    unet = trained(adapted(torch.bfloat16))
    results = []
    for widen in (False, True):
        for layer in adapter_layers(unet):
            assert layer.cast_input_dtype_enabled is False or widen
            layer.cast_input_dtype_enabled = widen
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = predict(base[0], unet, base[3])
        prediction.float().square().mean().backward()
        results.append([prediction, *(p.grad for p in unet.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "flags", [{}, {"use_dora": True}, {"lora_target_modules": CONVOLUTIONS}], ids=str
)
def test_merged_state_is_a_plain_unets(base, adapted, flags):
    unet = trained(adapted(**flags))
    start = base[2].state_dict()
    state = merged_state(unet)
    assert list(state) == list(start)
    want = merged(base, unet).state_dict()
    changed = 0
    for name, value in state.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(value, start[name])
    assert changed == len(adapter_layers(unet))


def test_half_precision_merges_into_the_weights_as_they_were_read(base, adapted):
    unet = trained(adapted(torch.bfloat16))
    state = merged_state(unet, {k: v.clone() for k, v in base[2].state_dict().items()})
    want = merged(base, unet).state_dict()
    for name, value in state.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
    plain = [k for k, v in base[2].state_dict().items() if torch.equal(v, state[k])]
    assert len(plain) == len(state) - len(adapter_layers(unet))


@pytest.mark.usefixtures("diffusers_finds_files")
@pytest.mark.parametrize(
    "flags", [{}, {"use_dora": True}, {"lora_target_modules": CONVOLUTIONS}], ids=str
)
def test_diffusers_loads_the_file(base, adapted, tmp_path, flags):
    """Also a scale other than one, which only diffusers' metadata tells."""
    family, source, _, inputs = base
    unet = trained(adapted(**flags))
    save_adapters(unet, tmp_path / LORA_FILE)
    assert [p.name for p in tmp_path.iterdir()] == [LORA_FILE]
    pipeline = family.pipeline(family.load_unet(source), family.load_frozen(source), source)
    before = predict(family, pipeline.unet, inputs)
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        found, want = predict(family, pipeline.unet, inputs), predict(family, unet, inputs)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert (want - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        ({}, {}),
        ({"lora_rank": 8, "lora_alpha": 8}, {"r": 8, "lora_alpha": 8}),
        ({"use_dora": True, "lora_dropout": 0.5}, {"use_dora": True, "lora_dropout": 0.5}),
    ],
    ids=str,
)
def test_metadata_holds_what_differs_from_pefts_defaults(adapted, tmp_path, flags, more):
    """peft 0.17 refuses a LoraConfig with the fields that 0.21 has (velora_config, ...), and
    diffusers 0.35 a file without the two patterns."""
    save_adapters(adapted(**flags), tmp_path / LORA_FILE)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
    want = {"r": RANK, "lora_alpha": int(ALPHA), "rank_pattern": {}, "alpha_pattern": {}, **more}
    want["target_modules"] = ["to_k", "to_out.0", "to_q", "to_v"]
    assert found == {f"unet.{name}": value for name, value in want.items()}


def test_a_file_of_all_fields_is_read_as_before(adapted, tmp_path):
    """Files written up to now name every field of their peft; weights alone are read of them."""
    unet = trained(adapted())
    save_adapters(unet, tmp_path / "now.safetensors")
    every = {f"unet.{k}": v for k, v in unet.peft_config["default"].to_dict().items()}
    meta = {"format": "pt", "lora_adapter_metadata": json.dumps(every, default=str)}
    save_file(load_file(tmp_path / "now.safetensors"), tmp_path / "old.safetensors", meta)
    other = adapted(seed=5)
    load_adapters(other, tmp_path / "old.safetensors")
    for mine, theirs in zip(other.parameters(), unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_files_are_read_back_to_the_bit_and_checked(base, adapted, tmp_path):
    unet = trained(adapted(use_dora=True))
    save_adapters(unet, tmp_path / "a.safetensors")
    other = adapted(use_dora=True, seed=5)
    pointers = [p.data_ptr() for p in other.parameters()]
    load_adapters(other, tmp_path / "a.safetensors")
    assert [p.data_ptr() for p in other.parameters()] == pointers
    for mine, theirs in zip(other.parameters(), unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for flags in ({}, {"use_dora": True, "lora_rank": 2}):
        with pytest.raises(UserError, match=r"a.safetensors does not fit this run's adapters"):
            load_adapters(adapted(**flags), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read .*b.safetensors"):
        load_adapters(other, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_target_modules": ["to_q", "o_k"]}, "--lora_target_modules: no .* called o_k;"),
        ({"lora_target_modules": ["attn1"]}, "--lora_target_modules: no .* called attn1;"),
        ({"lora_target_modules": ["conv1"], "use_dora": True}, "--use_dora .*conv1.* convolution"),
    ],
)
def test_targets_that_fit_no_layer(base, adapted, flags, said):
    with pytest.raises(UserError, match=said):
        adapted(**flags)
    assert not has_adapters(base[2])


def test_dropout_is_a_function_of_the_micro_batch(base, adapted):
    unet = trained(adapted(lora_dropout=0.5))

    def output(key):
        seed_dropout([key, (9, 9, 9)])
        return predict(base[0], unet, base[3])

    first = output((0, 0, 4))
    torch.rand(3)
    assert torch.equal(output((0, 0, 4)), first)
    assert not torch.equal(output((0, 0, 5)), first)
    unet.eval()
    assert torch.equal(output((0, 0, 4)), output((0, 0, 5)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_rank": 0}, "--lora_rank must be at least 1, got 0"),
        ({"lora_rank": 4, "lora_alpha": -1}, "--lora_alpha must be a number above 0"),
        ({"lora_rank": 4, "lora_dropout": 1}, "--lora_dropout must be at least 0 and below 1"),
        ({"lora_alpha": 4}, "--lora_alpha has no meaning without --lora_rank"),
        ({"lora_target_modules": ["to_q"]}, "--lora_target_modules has no meaning without"),
        ({"use_dora": True}, "--use_dora has no meaning without --lora_rank"),
        ({"lora_dropout": 0.1}, "--lora_dropout has no meaning without --lora_rank"),
        ({"lora_rank": 4, "offload_reference": True}, "--offload_reference has no meaning with"),
        ({"ema_decay": 1.0}, "--ema_decay must be at least 0 and below 1"),
    ],
)
def test_flags(make_config, flags, said):
    with pytest.raises(UserError, match=said):
        make_config(**flags)


def test_defaults(make_config):
    model = make_config(lora_rank=16).model
    assert model.lora_alpha == 16
    assert model.lora_target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert make_config().model.lora_rank is None

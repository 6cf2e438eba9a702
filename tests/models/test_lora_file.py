"""LoRA files in every naming: added into a UNet, and as the start of a run's adapters."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdpo.common.errors import UserError
from sdpo.data.pairs import PairBatch
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import noise_pairs, predict, predict_reference
from sdpo.models.lora import merged_state, save_adapters
from sdpo.models.lora_file import kohya_name, kohya_state, read_lora
from sdpo.models.original import unet_blocks, unet_name
from sdpo.models.reference import build_reference

CPU = torch.device("cpu")
RANK, ALPHA = 4, 6.0
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, tiny_sd15, tiny_sdxl):
    """(family, source, UNet, inputs of 2 pairs) of either family."""
    family = get_family(request.param)
    source = ModelSource(str(tiny_sdxl if family.sdxl else tiny_sd15))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = PairBatch(pixels, ["a red square", ""], [(0, 0, 0), (0, 0, 1)])
    encoder = ModelEncoder(family, family.load_frozen(source), 32, CPU)
    return family, source, family.load_unet(source), noise_pairs(encoder, batch)


def random_lora(unet, targets=TARGETS):
    """{layer's name: (down, up)} of all layers whose names end in one of `targets`."""
    rng = torch.Generator().manual_seed(2)
    layers = {}
    for name, module in unet.named_modules():
        if hasattr(module, "weight") and f".{name}".endswith(tuple(f".{t}" for t in targets)):
            out, *inputs = module.weight.shape
            down = torch.randn(RANK, *inputs, generator=rng) * 0.2
            up = torch.randn(out, RANK, *[1] * (len(inputs) - 1), generator=rng) * 0.2
            layers[name] = (down, up)
    return layers


def named(kind, layers, unet):
    """The state dict of a file of that naming."""
    blocks, state = unet_blocks(unet.config), {}
    for name, (down, up) in layers.items():
        if kind.startswith("kohya"):
            stem = kohya_name(unet_name(name, blocks) if kind == "kohya, original" else name)
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            state[f"{stem}.alpha"] = torch.tensor(ALPHA)
        elif kind == "peft":
            stem = f"base_model.model.unet.{name}"
            state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        elif kind == "diffusers":
            state |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
        else:  # the first naming of diffusers
            start, last = name.rsplit(".to_", 1)
            stem = f"unet.{start}.processor.to_{last.removesuffix('.0')}_lora"
            state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return {k: v.contiguous() for k, v in state.items()}


def with_product(unet, layers, scale):
    plain = copy.deepcopy(unet)
    for name, (down, up) in layers.items():
        weight = plain.get_submodule(name).weight
        with torch.no_grad():
            weight += scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return plain


@pytest.mark.parametrize("kind", ["kohya", "kohya, original", "peft", "diffusers", "processors"])
def test_every_naming_is_added_at_its_scale(base, tmp_path, kind):
    family, source, unet, _ = base
    layers = random_lora(unet)
    path = tmp_path / "l.safetensors"
    save_file(named(kind, layers, unet), path)
    found = family.load_unet(ModelSource(source.base, lora=str(path)))
    want = with_product(unet, layers, ALPHA / RANK if kind.startswith("kohya") else 1.0)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, want.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        found.state_dict()[f"{min(layers)}.weight"], unet.state_dict()[f"{min(layers)}.weight"]
    )


@pytest.mark.usefixtures("diffusers_finds_files")
@pytest.mark.parametrize("targets", [TARGETS, ("proj_in", "ff.net.2", "conv1", "time_emb_proj")])
def test_kohyas_naming_is_read_by_diffusers_as_by_us(base, tmp_path, targets):
    family, source, unet, inputs = base
    layers = random_lora(unet, targets)
    path = tmp_path / "k.safetensors"
    save_file(named("kohya", layers, unet), tmp_path / "own.safetensors")
    read = read_lora(tmp_path / "own.safetensors", unet, "--lora")
    assert read.keys() == layers.keys()
    save_file({k: v.contiguous() for k, v in kohya_state(read, unet.config).items()}, path)
    stem = "input_blocks" if family.sdxl else "down_blocks"
    assert any(name.startswith(f"lora_unet_{stem}_") for name in load_file(path))
    pipeline = family.pipeline(family.load_unet(source), family.load_frozen(source), source)
    pipeline.load_lora_weights(path)
    merged = family.load_unet(ModelSource(source.base, lora=str(path)))
    with torch.no_grad():
        want, found = predict(family, pipeline.unet, inputs), predict(family, merged, inputs)
        before = predict(family, unet, inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert (want - before).abs().max() > 0.01


def broken(state, name, how):
    """A state dict with one thing wrong."""
    state, one = dict(state), min(state)
    if how == "third text encoder":
        state["lora_te3_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(4, 4)
    elif how == "unknown layer of the text encoder":
        state["lora_te_text_model_encoder_layers_9_mlp_fc1.lora_down.weight"] = torch.zeros(4, 4)
    elif how == "unknown layer":
        state["lora_unet_down_blocks_9_attn.lora_down.weight"] = torch.zeros(4, 4)
    elif how == "another kind":
        state[f"{kohya_name(name)}.hada_w1_a"] = torch.zeros(4, 4)
    elif how == "half a layer":
        del state[next(k for k in state if "lora_up" in k)]
    elif how == "not finite":
        state[one] = torch.full_like(state[one], float("nan"))
    elif how == "shape":
        key = next(k for k in state if "lora_up" in k)
        state[key] = state[key][1:].contiguous()
    else:
        state = {one: torch.tensor(1.0)}
    return state


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("third text encoder", r"its lora_te3_.* adapts text encoder 3, and the base has \d; is"),
        (
            "unknown layer of the text encoder",
            r"layers_9.* fits no linear .* this text_encoder; is",
        ),
        ("unknown layer", r"its lora_unet_down_blocks_9_attn.* fits no linear layer"),
        ("another kind", r"hada_w1_a fits no linear layer .*another kind of adapter"),
        ("half a layer", r"it has no up weights; the file is not whole"),
        ("shape", r"do not fit a layer of shape"),
        ("not finite", r"is broken: its .* not finite"),
        ("alpha alone", r"it has no down weights"),
    ],
)
def test_nothing_is_dropped_in_silence(base, tmp_path, how, said):
    family, source, unet, _ = base
    layers = random_lora(unet)
    path = tmp_path / "l.safetensors"
    save_file(broken(named("kohya", layers, unet), min(layers), how), path)
    source = ModelSource(source.base, lora=str(path))
    with pytest.raises(UserError, match=said) as caught:
        family.load_frozen(source) if "text encoder" in how else family.load_unet(source)
    assert str(caught.value).startswith(f"--lora {path}")
    assert "\n" not in str(caught.value)


@pytest.fixture
def start_file(base, tmp_path):
    """A file of `random_lora` in kohya's naming."""
    path = tmp_path / "start.safetensors"
    save_file(named("kohya", random_lora(base[2]), base[2]), path)
    return path


def started(base, make_config, dtype=torch.float32, **flags):
    unet = copy.deepcopy(base[2])
    config = make_config(
        sdxl=base[0].sdxl, **{"lora_rank": RANK, "lora_alpha": ALPHA, **flags}
    ).model
    return unet.train(), build_reference(unet, config, 0, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_starts_from_the_file_and_so_does_its_reference(base, make_config, start_file, dtype):
    family, source, plain, inputs = base
    unet, reference = started(base, make_config, dtype, lora_init=start_file)

    def outputs():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            prediction = predict(family, unet, inputs)
        context = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        return prediction, predict_reference(family, reference, inputs, context)

    first, held = outputs()
    assert torch.equal(first, held)
    if dtype == torch.float32:
        want = predict(family, with_product(plain, random_lora(plain), ALPHA / RANK), inputs)
        torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)
        merged = family.load_unet(ModelSource(source.base, lora=str(start_file))).state_dict()
        for name, value in merged_state(unet).items():
            torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-7)
    trainable = {n for n, p in unet.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(random_lora(plain))
    assert all(".default." in name for name in trainable)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    moved, still = outputs()
    assert torch.equal(still, held)
    assert not torch.equal(moved, first)


def test_what_is_saved_is_the_trained_adapter_alone(base, make_config, start_file, tmp_path):
    unet, _ = started(base, make_config, lora_init=start_file)
    save_adapters(unet, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    layers = random_lora(base[2])
    assert len(found) == 2 * len(layers)
    for name, (down, up) in layers.items():
        assert torch.equal(found[f"unet.{name}.lora_A.weight"], down)
        assert torch.equal(found[f"unet.{name}.lora_B.weight"], up)


def test_a_run_goes_on_from_its_own_dora_file(base, make_config, tmp_path):
    unet, _ = started(base, make_config, use_dora=True)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25).add_(0.01)
    path = tmp_path / "dora.safetensors"
    save_adapters(unet, path)
    again, reference = started(base, make_config, use_dora=True, lora_init=path)
    want = predict(base[0], unet, base[3])
    assert torch.equal(predict(base[0], again, base[3]), want)
    assert torch.equal(predict_reference(base[0], reference, base[3], nullcontext()), want)
    merged = base[0].load_unet(ModelSource(base[1].base, lora=str(path)))
    torch.testing.assert_close(predict(base[0], merged, base[3]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_rank": 8}, "has rank 4, and --lora_rank is 8: give --lora_rank 4"),
        ({"lora_alpha": 4}, "has alpha 6 at .*: give --lora_alpha 6"),
        ({"use_dora": True}, "has no lengths of DoRA: leave out --use_dora"),
        (
            {"lora_target_modules": ["to_q", "conv1"]},
            r"adapts \d+ layers and --lora_target_modules \d+ \(.* is not in both\): give "
            "--lora_target_modules to_k to_out.0 to_q to_v$",
        ),
        ({"lora_rank": None, "lora_alpha": None}, "--lora_init has no meaning without --lora_rank"),
        ({"lora_init": "nowhere.safetensors"}, "--lora_init: there is no file nowhere.safetensors"),
    ],
)
def test_a_file_that_the_flags_do_not_fit(base, make_config, start_file, flags, said):
    with pytest.raises(UserError, match=said):
        started(base, make_config, **{"lora_init": start_file, **flags})


def test_alpha_of_diffusers_metadata(base, tmp_path):
    family, source, unet, _ = base
    layers = random_lora(unet, ("to_q",))
    names = list(layers)
    settings = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {names[0]: 2}}
    path = tmp_path / "l.safetensors"
    about = json.dumps({f"unet.{k}": v for k, v in settings.items()})
    save_file(named("peft", layers, unet), path, {"lora_adapter_metadata": about})
    found = read_lora(path, unet, "--lora")
    assert [found[name].alpha for name in names] == [2] + [8] * (len(names) - 1)
    save_file(
        named("peft", layers, unet), path, {"lora_adapter_metadata": '{"unet.use_rslora": true}'}
    )
    with pytest.raises(UserError, match="rslora"):
        family.load_unet(ModelSource(source.base, lora=str(path)))


TEXT_LAYERS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")


def text_lora(kind, encoders, alpha=ALPHA):
    """Random adapters of all text encoders, in one naming."""
    rng, state = torch.Generator().manual_seed(3), {}
    for i, encoder in enumerate(encoders):
        for name, module in encoder.named_modules():
            if not name.endswith(TEXT_LAYERS):
                continue
            out, inputs = module.weight.shape
            down = torch.randn(RANK, inputs, generator=rng) * 0.3
            up = torch.randn(out, RANK, generator=rng) * 0.3
            name = f"text_model.{name.removeprefix('text_model.')}"
            if kind == "kohya":
                number = i + 1 if len(encoders) > 1 else ""
                stem = f"lora_te{number}_{name.replace('.', '_')}"
                state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                state[f"{stem}.alpha"] = torch.tensor(alpha)
                continue
            stem = f"text_encoder{f'_{i + 1}' if i else ''}.{name}"
            ends = {
                "peft": ("lora_A", "lora_B"),
                "diffusers": ("lora_linear_layer.down", "lora_linear_layer.up"),
            }[kind]
            state |= {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up}
    return state


def encoded(encoders):
    ids = torch.tensor([[1, 5, 7, 2]])
    with torch.no_grad():
        return [encoder(ids, output_hidden_states=True).hidden_states[-1] for encoder in encoders]


@pytest.mark.usefixtures("diffusers_finds_files")
@pytest.mark.parametrize("kind", ["kohya", "peft", "diffusers"])
def test_text_encoders_are_adapted_as_diffusers_does(base, tmp_path, kind):
    family, source, unet, _ = base
    plain = family.load_frozen(source).text_encoders
    before = encoded(plain)
    path = tmp_path / "l.safetensors"
    unets = "kohya" if kind == "kohya" else "diffusers"
    state = {**named(unets, random_lora(unet), unet), **text_lora(kind, plain)}
    if kind == "peft":
        state = {**named("diffusers", random_lora(unet), unet), **text_lora(kind, plain)}
        state = {
            k.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): v
            for k, v in state.items()
        }
    save_file(state, path)
    pipeline = family.pipeline(family.load_unet(source), family.load_frozen(source), source)
    pipeline.load_lora_weights(path)
    theirs = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)][: len(plain)]
    with_lora = ModelSource(source.base, lora=str(path))
    found = encoded(family.load_frozen(with_lora).text_encoders)
    for one, want, old in zip(found, encoded(theirs), before, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5)
        assert (want - old).abs().max() > 0.01
    with torch.no_grad():
        merged = predict(family, family.load_unet(with_lora), base[3])
        torch.testing.assert_close(
            merged, predict(family, pipeline.unet, base[3]), rtol=1e-4, atol=1e-5
        )


def test_a_file_for_the_text_encoder_alone_leaves_the_unet(base, tmp_path):
    family, source, unet, _ = base
    path = tmp_path / "l.safetensors"
    save_file(text_lora("kohya", family.load_frozen(source).text_encoders), path)
    found = family.load_unet(ModelSource(source.base, lora=str(path))).state_dict()
    assert all(torch.equal(found[k], v) for k, v in unet.state_dict().items())


def test_a_run_does_not_start_from_a_file_with_text_adapters(base, make_config, tmp_path):
    path = tmp_path / "l.safetensors"
    state = named("kohya", random_lora(base[2]), base[2])
    text = text_lora("kohya", base[0].load_frozen(base[1]).text_encoders)
    said = r"--lora_init .*: \d+ of its \d+ weights adapt the text encoder .*for the UNet alone"
    save_file({**state, **text}, path)
    with pytest.raises(UserError, match=said):
        make_config(sdxl=base[0].sdxl, lora_rank=RANK, lora_alpha=ALPHA, lora_init=path)
    torch.save({**state, **text}, tmp_path / "l.bin")
    with pytest.raises(UserError, match=said):
        started(base, make_config, lora_init=tmp_path / "l.bin")


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_a_pickled_file_is_read_as_the_other(base, make_config, tmp_path, suffix):
    path = tmp_path / f"l{suffix}"
    torch.save(named("kohya", random_lora(base[2]), base[2]), path)
    unet, _ = started(base, make_config, lora_init=path)
    want = with_product(base[2], random_lora(base[2]), ALPHA / RANK)
    torch.testing.assert_close(
        predict(base[0], unet, base[3]), predict(base[0], want, base[3]), rtol=1e-4, atol=1e-5
    )


def mixed_lora(unet):
    """A file in kohya's naming whose layers have three ranks and alphas."""
    state, layers = {}, random_lora(unet)
    sizes = {}
    for i, (name, (down, up)) in enumerate(layers.items()):
        rank, alpha = ((RANK, 3.0), (2, 5.0), (2, 2.0))[i % 3]
        stem, sizes[name] = kohya_name(name), (rank, alpha)
        state[f"{stem}.lora_down.weight"] = down[:rank].contiguous()
        state[f"{stem}.lora_up.weight"] = up[:, :rank].contiguous()
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state, sizes


@pytest.mark.usefixtures("diffusers_finds_files")
def test_layers_of_several_ranks_keep_their_own(base, make_config, tmp_path):
    family, source, unet, inputs = base
    state, sizes = mixed_lora(unet)
    path, out = tmp_path / "l.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    run, reference = started(base, make_config, lora_init=path, lora_alpha=3)
    want = predict(family, family.load_unet(ModelSource(source.base, lora=str(path))), inputs)
    found = predict(family, run, inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(predict_reference(family, reference, inputs, nullcontext()), found)
    # What it saves is read as it was, by us and by diffusers.
    save_adapters(run, out)
    again = read_lora(out, unet, "--lora")
    assert {name: (layer.rank, layer.alpha) for name, layer in again.items()} == sizes
    pipeline = family.pipeline(family.load_unet(source), family.load_frozen(source), source)
    pipeline.load_lora_weights(out)
    theirs = predict(family, pipeline.unet, inputs)
    torch.testing.assert_close(theirs, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"has rank 4, and --lora_rank is 2: give --lora_rank 4"):
        started(base, make_config, lora_init=path, lora_rank=2)
    with pytest.raises(UserError, match=r"has alpha 3 at .*: give --lora_alpha 3"):
        started(base, make_config, lora_init=path, lora_alpha=5)

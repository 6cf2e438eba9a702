"""Runs of train.py whose frozen base is in 8 or 4 bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sdpo.common.errors import UserError
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.lora_file import merge_lora
from sdpo.models.quantized import round_linear_layers
from sdpo.training.checkpoint import read_state

from .harness import FLAGS, Run, base_unet, check_close, identical, resumed_copy, run_here

pytest.importorskip("bitsandbytes")

LORA = "pytorch_lora_weights.safetensors"
ADAPTERS = {**FLAGS, "lora_rank": 2, "learning_rate": 1e-2, "beta_dpo": 50}
# What else a run may ask of its base, one kind of bits each.
KINDS = {
    "8bit": {"channels_last": True, "winner_preserving_space": "parameter"},
    "4bit": {
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "offload_text_encoders": True,
        "validation_prompts": ["a red square"],
    },
}


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def model(bits, tiny_sd15, repo):
    """The 4-bit base is the shipped tiny SD3."""
    return repo / "assets/tiny-sd3" if bits == "4bit" else tiny_sd15


@pytest.fixture(scope="module")
def flags(bits, model):
    kind = {"pretrained_model_name_or_path": model, "quantize_base": bits}
    return {**ADAPTERS, **KINDS[bits], **kind}


@pytest.fixture(scope="module")
def whole(train, flags, tmp_path_factory) -> Run:
    return train(tmp_path_factory.mktemp("run"), **flags)


def test_a_run_from_margin_zero(whole, bits):
    for name in ("margin", "winner_drift", "loser_drift"):
        assert whole.metrics[0][name] == 0.0
    assert whole.metrics[-1]["winner_drift"] != 0
    assert torch.isfinite(torch.tensor(whole.column("loss"))).all()
    assert len(list((whole.out / "samples").glob("*.png"))) == (1 if bits == "4bit" else 0)


def test_files_compute_what_was_trained(whole, model, bits):
    """unet.pth and the pipeline's weights: the base at its quantised values with the LoRA file."""
    out = whole.out / "checkpoint-4"
    family = get_family("sd3" if (model / "transformer").is_dir() else "sd15")
    plain = family.load_unet(ModelSource(str(model)))
    round_linear_layers(plain, bits, torch.device("cpu"))
    merge_lora(plain, out / LORA, "--lora")
    saved = whole.unet()
    for name, value in plain.state_dict().items():
        assert torch.allclose(saved[name], value, 1e-5, 1e-6), name
    assert identical(base_unet(whole.out / "pipeline"), saved)


def test_the_base_is_told_as_it_was(train, whole, flags, bits, tmp_path, monkeypatch):
    """The digest is that of a run over the base in full; held-out errors are against the quantised
    reference."""
    full = train(tmp_path / "full", **{**flags, "quantize_base": None, "max_train_steps": 2})
    digests = [read_state(run.out / "checkpoint-2")["reference"] for run in (whole, full)]
    assert digests[0] == digests[1]
    held = []
    for run in (whole, full):
        argv = [run.out, "--split", "heldout", "--max_pairs", "4", "--timesteps", "2"]
        assert run_here("sdpo/evaluation/heldout.py", argv) == 0
        held.append([json.loads(line) for line in (run.out / "heldout.jsonl").open()])
    assert [line["step"] for line in held[0]] == [0, 2, 4]
    assert held[0][0]["winner_drift"] == 0 != held[0][1]["winner_drift"]
    assert held[0][0]["winner_mse"] != held[1][0]["winner_mse"]
    monkeypatch.setattr("sdpo.training.places.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--quantize_base needs the package bitsandbytes"):
        run_here("sdpo/evaluation/heldout.py", [whole.out, "--split", "heldout"])


def test_resumed_it_ends_in_the_same_bits(train, whole, flags, tmp_path):
    out = resumed_copy(whole, tmp_path / "run")
    with pytest.raises(UserError, match=r"made with --quantize_base .bit, this run has None"):
        train(out, **{**flags, "quantize_base": None})
    again = train(out, **flags)
    assert again.numbers == whole.numbers
    assert identical(again.unet(), whole.unet())
    assert identical(load_file(again.out / LORA), load_file(whole.out / LORA))


def test_two_processes_train_the_same(train, tiny_sd15, tmp_path):
    flags = {**ADAPTERS, "quantize_base": "4bit"}
    one = train(tmp_path / "one", **flags, train_batch_size=4)
    two = train.processes(tmp_path / "two", 2, **flags)
    check_close(two, one, base_unet(tiny_sd15))

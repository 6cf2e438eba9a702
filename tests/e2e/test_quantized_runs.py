"""Runs of train.py whose frozen base is in 8 or 4 bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sdpo.common.errors import UserError
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.training.checkpoint import read_state

from .harness import FLAGS, Run, base_unet, check_close, identical, resumed_copy

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


def test_files_are_of_the_base_as_it_was(train, whole, flags, model, tmp_path):
    """The plain base with the LoRA file is unet.pth and the pipeline's, and the digest of the
    reference that of a run over the base in full."""
    base, out = base_unet(model), whole.out / "checkpoint-4"
    family = get_family("sd3" if (model / "transformer").is_dir() else "sd15")
    plain = family.load_unet(ModelSource(str(model), lora=str(out / LORA)))
    saved = whole.unet()
    for name, value in plain.state_dict().items():
        assert torch.allclose(saved[name], value, 1e-5, 1e-6), name
    adapted = {name for name in base if not torch.equal(base[name], saved[name])}
    # Of the last block, which leaves the text, a layer of its own is adapted for nothing.
    assert 0 < len(adapted) <= len(load_file(out / LORA)) / 2
    assert identical(base_unet(whole.out / "pipeline"), saved)
    full = train(tmp_path / "full", **{**flags, "quantize_base": None, "max_train_steps": 2})
    digests = [read_state(run.out / "checkpoint-2")["reference"] for run in (whole, full)]
    assert digests[0] == digests[1]
    assert not identical(whole.unet(2), full.unet(2))


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

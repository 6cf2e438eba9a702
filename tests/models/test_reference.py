"""The reference's three forms give the same predictions, without a trace of autograd."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct

import pytest
import torch

from sdpo.data.pairs import PairBatch
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import noise_pairs, predict_reference
from sdpo.models.lora import AdaptersOff
from sdpo.models.offload import Offloaded
from sdpo.models.reference import build_reference, settings_of, weights_digest
from sdpo.training.checkpoint import check_reference

CPU = torch.device("cpu")
FORMS = [{}, {"offload_reference": True}, {"lora_rank": 2}]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, tiny_sd15, tiny_sdxl):
    """(family, UNet, inputs of 2 pairs) of either family."""
    family = get_family(request.param)
    source = ModelSource(str(tiny_sdxl if family.sdxl else tiny_sd15))
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = PairBatch(pixels, ["a red square", ""], [(0, 0, 0), (0, 0, 1)])
    encoder = ModelEncoder(family, family.load_frozen(source), 32, CPU)
    return family, family.load_unet(source), noise_pairs(encoder, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_forms_predict_the_same_to_the_bit(base, make_config, dtype):
    family, start, inputs = base
    outputs = []
    for flags in FORMS:
        unet = copy.deepcopy(start)
        reference = build_reference(
            unet, make_config(sdxl=family.sdxl, **flags).model, 0, dtype, CPU
        )
        # A run moves what it trains; the reference stays.
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        for _ in range(2):
            half = dtype == torch.bfloat16
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
            outputs.append(predict_reference(family, reference, inputs, autocast))
    assert not any(output.requires_grad for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_which_form_is_built(base, make_config):
    kinds = []
    for flags in FORMS:
        unet = copy.deepcopy(base[1])
        args = make_config(sdxl=base[0].sdxl, **flags)
        reference = build_reference(unet, args.model, 0, torch.float32, CPU)
        kinds.append(type(reference))
        held = reference.module if isinstance(reference, Offloaded) else reference
        if isinstance(reference, AdaptersOff):
            assert reference.unet is unet
        else:
            assert not any(p.requires_grad for p in held.parameters())
            assert not held.training
    assert kinds == [type(base[1]), Offloaded, AdaptersOff]


def test_the_digest_is_of_the_bits_of_all_weights():
    layer = torch.nn.Linear(3, 2)
    digest = hashlib.sha256()
    for name, weight in [("bias", layer.bias), ("weight", layer.weight)]:
        values = weight.flatten().tolist()
        bits = sum(struct.unpack(f"<{len(values)}i", struct.pack(f"<{len(values)}f", *values)))
        digest.update(f"{name} {tuple(weight.shape)} {bits} ".encode())
        digest.update(struct.pack(f"<{len(values)}f", *values))
    assert weights_digest(layer) == digest.hexdigest()


def settings(base):
    family, source = get_family("sd15"), ModelSource(str(base))
    return settings_of(family.load_unet(source), family.load_scheduler(source))


@pytest.mark.parametrize("sampler", [None, "DPMSolverMultistepScheduler"])
def test_an_old_base_that_a_pipeline_saved_again_is_the_same(tiny_sd15, tmp_path, sampler):
    """Although diffusers puts old settings of sampling right, or another sampler was chosen."""
    import diffusers

    old, again = tmp_path / "old", tmp_path / "again"
    shutil.copytree(tiny_sd15, old)
    bare = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for file, config in {
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", **bare},
        "unet/config.json": {
            **json.loads((old / "unet" / "config.json").read_text()),
            "_diffusers_version": "0.6.0",
            "sample_size": 32,
        },
    }.items():
        (old / file).write_text(json.dumps(config))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(old, safety_checker=None)
    if sampler:
        cls = getattr(diffusers, sampler)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(again)
    before = settings(old)
    state = {"step": 1, "place": [0, 0], "args": {}, "reference": "same", "base": before}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert json.loads((again / "unet" / "config.json").read_text())["sample_size"] == 64
    check_reference(tmp_path, "same", settings(again))
    assert before["scheduler"]["beta_end"] == 0.012 and before["denoiser"]["norm_eps"] == 1e-5

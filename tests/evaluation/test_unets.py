"""Names of UNets: where they lie, what a directory is called after them."""

from __future__ import annotations

import pytest
import torch

from sdpo.evaluation.generate.unets import UNET_FILE, check_unet, digest_of, label_of, locate_unet


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("base", "base"),
        ("unet.pth", "unet"),
        ("mine.safetensors", "mine"),
        ("output/sd15_dmpo/checkpoint-2000/unet.pth", "sd15_dmpo_checkpoint-2000"),
        ("output/sd15_dmpo/checkpoint-2000", "sd15_dmpo_checkpoint-2000"),
        ("output/sd15_dmpo/checkpoint-2000/unet_ema.pth", "sd15_dmpo_checkpoint-2000_ema"),
        ("unet_ema.pth", "unet_ema"),
        ("output/run/pipeline", "run"),
        ("output/run/pipeline_ema", "run_ema"),
        ("output/run/pipeline_ema/unet", "run_ema"),
        ("output/run/pipeline/unet", "run"),
        ("/data/My Run/unet/diffusion_pytorch_model.safetensors", "My_Run"),
        ("../weights/dspo.pth", "dspo"),
        ("AIDC-AI/Diffusion-SDPO:sd1.5/dmpo/unet.pth", "sd1.5_dmpo"),
        ("someone/model.v2", "model.v2"),
    ],
)
def test_labels(name, label):
    assert label_of(name) == label


def test_the_file_is_named_as_checkpoints_name_it():
    from sdpo.training import checkpoint

    assert checkpoint.UNET_FILE == UNET_FILE


def test_a_hub_file_comes_from_the_cache(tmp_path):
    commit = "0" * 40
    home = tmp_path / "models--AIDC-AI--Diffusion-SDPO"
    file = home / "snapshots" / commit / "sd1.5" / "dmpo" / "unet.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    name = "AIDC-AI/Diffusion-SDPO:sd1.5/dmpo/unet.pth"
    check_unet(name, "sd15")
    assert locate_unet(name, str(tmp_path)) == str(file)


def test_what_is_passed_on(tmp_path):
    assert locate_unet("base", None) is None
    assert locate_unet("someone/model", None) == "someone/model"
    assert locate_unet("a/unet.pth", None) == "a/unet.pth"


def test_digest_is_of_names_and_float32_values():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    first = digest_of(layer)
    assert digest_of(layer) == first
    half = torch.nn.Linear(3, 2)
    half.load_state_dict({k: v.half() for k, v in layer.state_dict().items()})
    assert digest_of(half) != first
    assert digest_of(half.half()) == digest_of(half.float())
    with torch.no_grad():
        layer.bias[1] += 1e-6
    assert digest_of(layer) != first

"""Text encoders are saved under the names that transformers 4 and 5 both read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from sdpo.common.text_encoders import name_for_all_versions


@pytest.mark.parametrize("folder", ["assets/tiny-sd15", "assets/tiny-sdxl"])
def test_the_shipped_models_have_them(repo, folder):
    for path in sorted((repo / folder).glob("text_encoder*/*.safetensors")):
        names = load_file(path).keys() - {"text_projection.weight"}
        assert names
        assert all(name.startswith("text_model.") for name in names)


def test_saved_again_they_load_the_same(repo, tmp_path):
    encoder = CLIPTextModel.from_pretrained(repo / "assets/tiny-sd15", subfolder="text_encoder")
    encoder.save_pretrained(tmp_path / "text_encoder")
    name_for_all_versions(tmp_path)
    name_for_all_versions(tmp_path)
    state = load_file(tmp_path / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in state)
    again = CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder")
    want = encoder.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in again.state_dict().items())

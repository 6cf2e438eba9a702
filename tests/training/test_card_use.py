"""The programs of a model card, as text: what they load, and from where."""

from __future__ import annotations

import ast

import pytest

from sdpo.config import ModelConfig
from sdpo.training.card_use import Weights, code

ODD = 'my "best" \\ dir'


def strings(program):
    """The texts that stand in a program, which must be Python."""
    return {node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("kind", ["pipeline", "single_file", "lora", "unet"])
def test_odd_names_are_quoted(tmp_path, kind):
    base = tmp_path / ODD
    base.mkdir()
    name = f"{ODD}.safetensors"
    program = code(Weights(kind, name), ModelConfig(str(base)), "sd15", 64, None)
    said = {str(s) for s in strings(program)}
    assert any(name in one for one in said)
    assert kind == "pipeline" or str(base) in said


@pytest.mark.parametrize("kind", ["single_file", "lora"])
def test_a_repository_tells_no_path_of_the_machine(tmp_path, kind):
    base, vae = tmp_path / "base", tmp_path / "vae"
    base.mkdir()
    model = ModelConfig(str(base), pretrained_vae_model_name_or_path=str(vae))
    program = code(Weights(kind, "w.safetensors"), model, "sd15", 64, "org/name")
    assert str(tmp_path) not in program
    assert "path/to/base" in strings(program)
    assert any("org/name" in str(one) for one in strings(program))


def test_vae_revision_and_single_file_of_the_base(tmp_path):
    lora = Weights("lora", "w.safetensors")
    model = ModelConfig("org/base", pretrained_vae_model_name_or_path="org/vae", revision="v2")
    program = code(lora, model, "sd15", 64, "org/name")
    assert 'DiffusionPipeline.from_pretrained("org/base", revision="v2")' in program
    assert 'pipeline.vae = AutoencoderKL.from_pretrained("org/vae")' in program
    file = tmp_path / "base.safetensors"
    file.touch()
    model = ModelConfig(str(file), single_file_config="org/base", sdxl=True)
    program = code(lora, model, "sd15", 64, None)
    assert f'StableDiffusionXLPipeline.from_single_file("{file}", config="org/base")' in program


def test_parts_that_a_transformer_has_not_are_named():
    """As diffusers wants it; and its denoiser is no UNet."""
    absent = ("text_encoder_3", "tokenizer_3")
    model = ModelConfig("org/base")
    program = code(Weights("pipeline", "pipeline"), model, "sd3", 64, None, absent)
    assert 'from_pretrained("./pipeline", text_encoder_3=None, tokenizer_3=None)' in program
    program = code(Weights("unet", "unet.pth"), model, "sd3", 64, None, absent)
    assert "pipeline.transformer.load_state_dict(" in program
    assert 'from_pretrained("org/base", text_encoder_3=None, tokenizer_3=None)' in program

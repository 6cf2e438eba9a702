"""What FLUX.2 klein has of its own: steps that were distilled, and a sibling that is told more."""

from __future__ import annotations

import json

import pytest
import torch
from micro_bases import save_base

from sdpo.common.errors import UserError
from sdpo.models import open_base


@pytest.fixture
def base(tmp_path):
    save_base("flux2-klein", tmp_path / "klein")
    return tmp_path / "klein"


def changed(base, file, **changes):
    """Change a file of a base."""
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**content, **changes}))


def test_a_distilled_base_is_sampled_without_guidance(make_config, base):
    found = {}
    for distilled in (False, True):
        changed(base, "model_index.json", is_distilled=distilled)
        family, source = open_base(make_config(pretrained_model_name_or_path=base))
        frozen = family.load_frozen(source)
        pipeline = family.pipeline(family.load_unet(source), frozen, source)
        for guidance in (1.0, 4.0):
            noise = torch.Generator().manual_seed(0)
            found[distilled, guidance] = pipeline(
                **family.call_options(pipeline, ["a red square"], guidance), height=64, width=64,
                num_inference_steps=1, generator=noise, output_type="np",
            ).images  # fmt: skip
    assert (found[True, 1.0] == found[True, 4.0]).all()
    assert (found[False, 1.0] != found[False, 4.0]).any()


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "of Flux2KleinPipeline is needed"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is True, so"),
        ("vae/config.json", {"latent_channels": 32}, "32 latent_channels, but .* takes 4"),
    ],
)
def test_what_is_not_served(make_config, base, file, changes, said):
    changed(base, file, **changes)
    with pytest.raises(UserError, match=said):
        make_config(pretrained_model_name_or_path=base)

"""What Sana has of its own: an autoencoder without a posterior, and an instruction."""

from __future__ import annotations

import json

import pytest
import torch
from micro_bases import save_base

from sdpo.common.errors import UserError
from sdpo.models import open_base


@pytest.fixture
def base(tmp_path):
    save_base("sana", tmp_path / "sana")
    return tmp_path / "sana"


def test_an_image_has_one_encoding(make_config, base):
    config = make_config(pretrained_model_name_or_path=base, resolution=None)
    assert (config.safeguard.scope, config.data.resolution) == ("pair", 64)
    family, source = open_base(config)
    frozen = family.load_frozen(source)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = [family.encode_images(frozen, pixels, torch.full((1, 4, 16, 16), n)) for n in (0, 1)]
    assert torch.equal(*latents)
    torch.testing.assert_close(latents[0], 0.41 * frozen.vae.encode(pixels).latent)
    # An instruction stands before a caption, of which its first and last token are kept.
    words = family.encode_text(frozen, ["a red square"])["mask"].sum()
    assert words == 2 + 3


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "SanaSprintPipeline"}, "of SanaPipeline is needed"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is True, so"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "an AutoencoderDC is needed"),
        ("vae/config.json", {"latent_channels": 32}, "32 latent_channels, but .* takes 4"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "no rectified flow"),
    ],
)
def test_what_is_not_served(make_config, base, file, changes, said):
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(UserError, match=said):
        make_config(pretrained_model_name_or_path=base)

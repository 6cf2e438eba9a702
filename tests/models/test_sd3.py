"""SD3 against diffusers' own pipeline, on micro transformers with and without T5."""

from __future__ import annotations

import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.noise import RectifiedFlow

CAPTIONS = ["a red square on a blue background", "", "word " * 60, "Ünïcode"]


@pytest.fixture(scope="module")
def loaded(tiny_sd3):
    """(family, source, frozen, diffusers' own pipeline)."""
    from diffusers import StableDiffusion3Pipeline

    family, source = get_family("sd3"), ModelSource(str(tiny_sd3))
    family.check(source)
    return (
        family,
        source,
        family.load_frozen(source),
        StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None),
    )


def test_captions_are_encoded_as_the_pipeline_does(loaded):
    family, _, frozen, pipeline = loaded
    found = family.encode_captions(frozen, CAPTIONS, 64)
    hidden, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS,
        None,
        CAPTIONS,
        do_classifier_free_guidance=False,
        max_sequence_length=pipeline.tokenizer_max_length,
    )
    torch.testing.assert_close(found["hidden"], hidden)
    torch.testing.assert_close(found["pooled"], pooled)
    assert found["hidden"].shape == (4, 48, 32)


def test_predict_is_the_pipelines_own_call(loaded):
    """What the pipeline's loop asks of its transformer, asked by `predict`."""
    family, source, frozen, pipeline = loaded
    calls = []
    forward = pipeline.transformer.forward

    def record(**kwargs):
        calls.append((kwargs, forward(**kwargs)))
        return calls[-1][1]

    pipeline.transformer.forward = record
    options = family.call_options(pipeline, CAPTIONS[:2], 1.0)
    generator = torch.Generator().manual_seed(0)
    pipeline(**options, height=64, width=64, num_inference_steps=3, generator=generator)
    pipeline.transformer.forward = forward
    assert len(calls) == 3
    conditions = family.encode_captions(frozen, CAPTIONS[:2], 64)
    for kwargs, (output,) in calls:
        torch.testing.assert_close(conditions["hidden"], kwargs["encoder_hidden_states"])
        sigma = kwargs["timestep"] / 1000
        found = family.predict(family.load_unet(source), kwargs["hidden_states"], sigma, conditions)
        torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-5)


def test_a_euler_step_along_the_target_is_the_schedulers(loaded):
    family, source, *_ = loaded
    scheduler = family.load_sampler(source)
    scheduler.set_timesteps(4)
    process = family.process(scheduler, (4, 16, 16))
    clean, noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    now, then = scheduler.sigmas[1:3]
    x_t = process.noised(clean, noise, now.expand(3))
    velocity = process.target(clean, noise, now.expand(3))
    stepped = scheduler.step(velocity, scheduler.timesteps[1], x_t).prev_sample
    torch.testing.assert_close(stepped, process.noised(clean, noise, then.expand(3)))
    torch.testing.assert_close(x_t - now * velocity, clean, rtol=1e-4, atol=1e-5)


def test_normalise_and_denormalise_are_inverse(loaded):
    family = loaded[0]
    vae = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    normal = family.normalise(latents, vae)
    torch.testing.assert_close(normal, (latents - 0.0609) * 1.5305)
    torch.testing.assert_close(family.denormalise(normal, vae), latents)


def test_the_process_is_the_bases_own(loaded):
    family, source, *_ = loaded
    assert family.process(family.load_scheduler(source), (4, 16, 16)) == RectifiedFlow(1.0)


def test_a_base_with_t5(loaded, tmp_path):
    """T5's hidden states follow CLIP's along the tokens, as the pipeline has them."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    family, _, _, pipeline = loaded
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *["a", "red", "square", "on", "a", "blue", "background", "word"],
    ]
    words = list(dict.fromkeys(words))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    t5 = T5EncoderModel(
        T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    whole = type(pipeline)(
        **{**pipeline.components, "text_encoder_3": t5.eval(), "tokenizer_3":
           PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                   eos_token="</s>")}
    )  # fmt: skip
    whole.save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    source = ModelSource(str(tmp_path / "base"))
    assert family.text_folders(source) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    frozen = family.load_frozen(source)
    found = family.encode_captions(frozen, CAPTIONS, 64)
    hidden, _, pooled, _ = whole.encode_prompt(
        CAPTIONS, None, CAPTIONS, do_classifier_free_guidance=False
    )
    assert found["hidden"].shape == (4, 24 + 256, 32)
    torch.testing.assert_close(found["hidden"], hidden, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["pooled"], pooled)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "no rectified flow"),
        ("scheduler/scheduler_config.json", {"shift": 0}, "shift is 0"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True, "base_shift": None},
         "base_shift is None"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas"),
        ("transformer/config.json", {"_class_name": "OtherTransformer2DModel"}, "OtherTransformer"),
        ("transformer/config.json", {"in_channels": 16}, "4 latent_channels.*takes 16"),
        ("model_index.json", {"_class_name": "StableDiffusion3InpaintPipeline"}, "another task"),
    ],
)  # fmt: skip
def test_another_kind_of_base_is_refused(tiny_sd3, tmp_path, file, changes, said):
    import json
    import shutil

    from sdpo.config import ModelConfig
    from sdpo.models.locations import check_model_location

    path = tmp_path / "base"
    shutil.copytree(tiny_sd3, path)
    (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), **changes}))
    with pytest.raises(UserError, match=said):
        check_model_location(ModelConfig(pretrained_model_name_or_path=str(path)))

"""Micro bases of the transformer families: real classes, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sdpo.config.families import FAMILIES

WORDS = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "a", "red", "square", "on", "blue"]
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096,
           "base_shift": 0.5, "max_shift": 1.15}  # fmt: skip


def word_tokenizer(around: str | None = None):
    """A tokenizer of a few words with a chat template; `around` says where </s> stands, as in
    "$A </s>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        ends = [("</s>", WORDS.index("</s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=ends)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{% endfor %}"
    )
    return made


def small_vae(channels: int, shift: float | None = 0.12, levels: int = 3):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, *(8,) * (levels - 1)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.36,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def small_t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    from sdpo.tinyworld.architecture import SIZES, _text_config, build_tokenizer

    clip = build_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC),
        vae=small_vae(4),
        text_encoder=CLIPTextModel(_text_config(SIZES["micro"], clip, 2)),
        tokenizer=clip,
        text_encoder_2=small_t5(),
        tokenizer_2=word_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def qwen_image():
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6, "max_position_embeddings": 2048,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vocab_size=32, hidden_size=16,
        vision_start_token_id=1, vision_end_token_id=2, vision_token_id=3, image_token_id=4,
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=word_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
        ),
    )  # fmt: skip


def z_image():
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(4),
        text_encoder=Qwen3Model(
            Qwen3Config(
                hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=32, max_position_embeddings=2048, head_dim=8,
            )
        ),
        tokenizer=word_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=16, axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
        ),
    )  # fmt: skip


def pixart_sigma():
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    return PixArtSigmaPipeline(
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02),
        vae=small_vae(4, shift=None),
        text_encoder=small_t5(),
        tokenizer=word_tokenizer("$A </s>"),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16,
            caption_channels=32, sample_size=16, norm_num_groups=4,
        ),
    )  # fmt: skip


def small_gemma():
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=32, max_position_embeddings=2048, head_dim=8,
        )
    )  # fmt: skip


def sana():
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    return SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_block_out_channels=(4, 8, 8),
            decoder_block_out_channels=(4, 8, 8), encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41,
        ),
        text_encoder=small_gemma(),
        tokenizer=word_tokenizer("</s> $A"),
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
            cross_attention_dim=8, caption_channels=16, sample_size=16,
        ),
    )  # fmt: skip


def lumina_2():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )

    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=small_vae(4, levels=4),  # the pipeline takes eight pixels to a latent for granted
        text_encoder=small_gemma(),
        tokenizer=word_tokenizer("</s> $A"),
        transformer=Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 64, 64), cap_feat_dim=16,
        ),
    )  # fmt: skip


def flux2_klein():
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
        latent_channels=4,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(  # of its layers the 9th, 18th and 27th are asked
                hidden_size=16, intermediate_size=16, num_hidden_layers=27, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=32, max_position_embeddings=2048, head_dim=8,
            )
        ),
        tokenizer=word_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        ),
    )  # fmt: skip


BUILD = {
    "flux": flux,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "lumina-2": lumina_2,
    "flux2-klein": flux2_klein,
}


def save_base(family: str, path: Path):
    """Save a micro base of a family, no layer of which is at zero; returns its diffusers pipeline.
    The test is skipped where this diffusers lacks one of the family's classes."""
    import diffusers

    facts = FAMILIES[family]
    for name in (facts.model, facts.vae_model, facts.pipeline):
        if not hasattr(diffusers, name):
            pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    if facts.since and tuple(map(int, diffusers.__version__.split(".")[:2])) < facts.since:
        pytest.skip(f"diffusers {diffusers.__version__} computes something else")
    torch.manual_seed(0)
    pipeline = BUILD[family]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
            for parameter in part.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
    pipeline.save_pretrained(path)
    return type(pipeline).from_pretrained(path)

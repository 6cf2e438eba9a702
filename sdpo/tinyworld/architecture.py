"""Tiny Stable Diffusion pipelines in the genuine diffusers layout, with random weights by seed.

    python -m sdpo.tinyworld.architecture --family sdxl --size micro --out DIR

Same parts, names and files as ``stable-diffusion-v1-5``, ``stable-diffusion-xl-base-1.0`` and
``stable-diffusion-3.5-medium`` (without its T5), only smaller: the VAE halves a 64 px image twice
(4 x 16 x 16 latents) and prompts hold 24 tokens.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import replace_directory
from sdpo.common.flags import Check, flag, parse
from sdpo.common.text_encoders import name_for_all_versions
from sdpo.tinyworld import world

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTokenizer

# diffusers' pipelines of the families, whose components are attributes that no type names.
Pipeline = Any
PROGRAM = "python -m sdpo.tinyworld.architecture"
FAMILIES = ("sd15", "sdxl", "sd3")
PROMPT_LENGTH = 24
LATENT_SIZE = 16


@dataclass(frozen=True)
class Size:
    """Widths of one size: channels of the VAE and UNet levels, width of the text encoders, and the
    transformer's blocks and width of a head."""

    vae_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    text_width: int
    heads: int
    norm_groups: int
    time_id_width: int
    blocks: int
    head_width: int


SIZES = {
    "small": Size((8, 16, 32), (32, 64), 64, 4, 8, 8, 4, 32),
    "micro": Size((4, 8, 8), (8, 16), 16, 2, 4, 4, 2, 8),
}


@dataclass(frozen=True)
class ArchitectureConfig:
    """The program's flags."""

    family: str = flag("", "kind of pipeline", choices=FAMILIES, required=True)
    size: str = flag("small", "small ships in assets/, micro is for tests", choices=tuple(SIZES))
    out: Path = flag(None, "folder to write the pipeline to", required=True)
    seed: int = flag(0, "of the weights", check=Check("not be negative", lambda value: value >= 0))


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Learn byte-pair merges, in order, after which each word is a single ``word</w>`` token.

    Takes the most frequent pair each time, so that applying merges by rank, as BPE does, cannot
    get stuck halfway through a word.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(pieces) > 1 for pieces in spelled):
        counts = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in spelled:
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """Build CLIP's byte-level BPE over the world's words; any other text falls apart into bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = learn_merges(world.vocabulary())
    letters = sorted(ByteLevel.alphabet())
    # The order of CLIP's own vocabulary: bytes, bytes that end a word, merges, specials.
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += [first + second for first, second in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if "vocab" in inspect.signature(CLIPTokenizer.__init__).parameters:
        return CLIPTokenizer(
            vocab=vocab,
            merges=merges,  # type: ignore[arg-type]
            model_max_length=PROMPT_LENGTH,
        )
    # transformers 4 takes files.
    with tempfile.TemporaryDirectory() as directory:
        _write_bpe(Path(directory), vocab, [" ".join(pair) for pair in merges])
        made: CLIPTokenizer = CLIPTokenizer.from_pretrained(
            directory, model_max_length=PROMPT_LENGTH
        )
    return made


def _write_bpe(folder: Path, vocab: dict[str, int], merges: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def _text_config(size: Size, tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        projection_dim=size.text_width,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        max_position_embeddings=PROMPT_LENGTH,
        # Pooling takes the state at the first token of this id.
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_vae(size_name: str) -> AutoencoderKL:
    """Build an autoencoder of factor 4 with 4 latent channels: (B, 3, 64, 64) to (B, 4, 16, 16)."""
    from diffusers import AutoencoderKL

    size = SIZES[size_name]
    levels = len(size.vae_channels)
    return AutoencoderKL(
        sample_size=world.IMAGE_SIZE,
        latent_channels=4,
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=size.norm_groups // 2,
    )


def _build_unet(family: str, size: Size) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    extra: dict[str, object] = {}
    context_width = size.text_width
    if family == "sdxl":
        context_width = 2 * size.text_width
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size.time_id_width,
            "projection_class_embeddings_input_dim": 6 * size.time_id_width + size.text_width,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=size.unet_channels,
        layers_per_block=1,
        # Attention at 8 x 8 alone, as SDXL leaves it out at full size: on a CPU a step costs half.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context_width,
        # diffusers reads this as the number of heads.
        attention_head_dim=size.heads,
        norm_num_groups=size.norm_groups,
        **extra,
    )


def _build_transformer(size: Size) -> SD3Transformer2DModel:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=size.blocks,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        caption_projection_dim=size.heads * size.head_width,
        joint_attention_dim=2 * size.text_width,
        pooled_projection_dim=2 * size.text_width,
        pos_embed_max_size=2 * LATENT_SIZE,
        qk_norm="rms_norm",
    )


def build_pipeline(family: str, size: str = "small", seed: int = 0) -> Pipeline:
    """Build a pipeline with random float32 weights, equal for equal arguments; the global RNG stays
    as it was.

    Args:
        family: "sd15", "sdxl" or "sd3".
        size: "small" (what ships in ``assets/``) or "micro" (for tests).

    Raises:
        ValueError: on other names.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    import torch
    from diffusers import (
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    widths = SIZES[size]
    tokenizer = build_tokenizer()
    schedule: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {"tokenizer": tokenizer, "vae": build_vae(size)}
        if family == "sd3":
            parts["transformer"] = _build_transformer(widths)
        else:
            parts["unet"] = _build_unet(family, widths)
        # The others read their encoders one layer before the last, so they get one more.
        layers = 2 if family == "sd15" else 3
        first: Any = CLIPTextModelWithProjection if family == "sd3" else CLIPTextModel
        parts["text_encoder"] = first(_text_config(widths, tokenizer, layers))
        if family != "sd15":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(
                _text_config(widths, tokenizer, layers)
            )
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if family == "sd15":
        return StableDiffusionPipeline(
            **parts,
            scheduler=PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if family == "sd3":
        # Without a number there the pipeline cannot decode.
        parts["vae"].register_to_config(shift_factor=0.0)
        return StableDiffusion3Pipeline(
            **parts,
            tokenizer_2=build_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
            # Images of so few tokens need no shift towards noise.
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer_2=build_tokenizer(),
        scheduler=EulerDiscreteScheduler(**schedule, timestep_spacing="leading"),
        # Captions are dropped to "" in training, so "" is also the unconditional prompt.
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def save_pipeline(pipeline: Pipeline, directory: str | PathLike[str]) -> None:
    """Save a pipeline beside ``directory`` and rename it, in the place of what is there.

    Adds to diffusers' files each tokenizer's vocab.json and merges.txt, which real checkpoints have
    and newer transformers no longer write.
    """
    target = Path(directory)
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside)
    name_for_all_versions(beside)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer: Any = getattr(pipeline, name, None)
        if not hasattr(tokenizer, "backend_tokenizer"):
            continue  # there is none, or transformers 4 has written them
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
        _write_bpe(beside / name, bpe["vocab"], merges)
    replace_directory(beside, target)


def main(argv: Sequence[str]) -> int:
    """Write the pipeline that the flags describe and print its folder.

    Raises:
        UserError: naming the flag and what would be right.
    """
    about = "Write a tiny pipeline with random weights in the diffusers layout."
    config = parse(ArchitectureConfig, argv, PROGRAM, about)
    # Overwriting is only safe for what an earlier call left there.
    if config.out.exists() and not (config.out / "model_index.json").is_file():
        raise UserError(f"--out {config.out} exists and holds no pipeline; choose a new folder")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_pipeline(build_pipeline(config.family, config.size, config.seed), config.out)
    print(config.out)
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), PROGRAM)

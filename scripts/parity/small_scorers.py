"""Random weights for the scorers: the published files' names, layout and architecture at any size,
loaded by the code that loads the published ones.

Each `write_*` makes the files in a directory and returns what `--weights` takes for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.parity.random_weights import random_tensor
from scripts.parity.vocabulary import write_vocabulary

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BlipSize:
    """Sizes of an ImageReward; the defaults are the smallest that do everything."""

    image_width: int = 64
    image_depth: int = 2
    text_width: int = 64
    text_depth: int = 2
    text_heads: int = 4
    patch: int = 16
    vocabulary: int = 30524

    def med_config(self) -> dict[str, Any]:
        """Give what the published med_config.json says, at this size."""
        return {
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": self.text_width,
            "initializer_range": 0.02,
            "intermediate_size": 4 * self.text_width,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": self.text_heads,
            "num_hidden_layers": self.text_depth,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": self.vocabulary,
            "encoder_width": 768,
            "add_cross_attention": True,
        }


SMALL_BLIP = BlipSize()
TRUE_BLIP = BlipSize(1024, 24, 768, 12, 12)

SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 80, "head_width": 40, "patch_size": 28},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_SMALL_CLIP_TEXT = {**_TOWER, "vocab_size": 49408, "eos_token_id": 49407}
_SMALL_CLIP_VISION = {**_TOWER, "image_size": 224, "patch_size": 28}


def write_imagereward(directory: Path, size: BlipSize = SMALL_BLIP) -> dict[str, str]:
    """Write ImageReward.pt, med_config.json and a tokenizer's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    state = random_state(imagereward_shapes(size))
    torch.save(state, directory / "ImageReward.pt")
    (directory / "med_config.json").write_text(json.dumps(size.med_config()))
    tokenizer = write_vocabulary(directory / "tokenizer")
    return {"imagereward": str(directory), "imagereward.tokenizer": str(tokenizer)}


def write_hpsv2(directory: Path, config: dict[str, Any] = SMALL_CLIP) -> dict[str, str]:
    """Write HPS_v2_compressed.pt and, unless it is the published architecture,
    open_clip_config.json."""
    state = _open_clip_state(directory, config)
    torch.save({"state_dict": state}, directory / "HPS_v2_compressed.pt")
    return {"hpsv2": str(directory)}


def write_clip(directory: Path, config: dict[str, Any] = SMALL_CLIP) -> dict[str, str]:
    """Write open_clip_pytorch_model.bin and, as above, open_clip_config.json."""
    torch.save(_open_clip_state(directory, config), directory / "open_clip_pytorch_model.bin")
    return {"clip": str(directory)}


def _open_clip_state(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from open_clip import get_model_config

    directory.mkdir(parents=True, exist_ok=True)
    if config != get_model_config("ViT-H-14"):
        text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
        (directory / "open_clip_config.json").write_text(text)
    return random_state(clip_shapes(config))


def write_pickscore(directory: Path) -> dict[str, str]:
    """Write a transformers CLIPModel with its tokenizer beside it."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=_SMALL_CLIP_TEXT, vision_config=_SMALL_CLIP_VISION, projection_dim=16
    )
    model = CLIPModel(config)
    fill(model)
    model.save_pretrained(directory)
    write_clip_tokenizer(directory)
    return {"pickscore": str(directory)}


def write_clip_tokenizer(directory: Path) -> None:
    """Write CLIP's own vocabulary as transformers keeps it, from the copy that open_clip has."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own = SimpleTokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in own.bpe_ranks)]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n")
    CLIPTokenizer.from_pretrained(directory, model_max_length=77).save_pretrained(directory)


def write_aesthetics(directory: Path) -> dict[str, str]:
    """Write the head's file and a transformers CLIP vision tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**_SMALL_CLIP_VISION, projection_dim=16))
    fill(tower)
    tower.save_pretrained(directory / "clip")
    path = directory / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(random_state(dict(_head("layers", 16))), path)
    return {"aesthetics": str(path), "aesthetics.clip": str(directory / "clip")}


def write_all(directory: Path) -> dict[str, str]:
    """Write all five of the published; returns them as `--weights` takes them."""
    found: dict[str, str] = {}
    for name, write in WRITERS.items():
        found |= write(directory / name)
    return found


def fill(module: torch.nn.Module) -> None:
    """Fill every floating point tensor of a module with the random weights of its name and
    shape."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape))))


WRITERS = {
    "pickscore": write_pickscore,
    "hpsv2": write_hpsv2,
    "aesthetics": write_aesthetics,
    "clip": write_clip,
    "imagereward": write_imagereward,
}


def random_state(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Draw a state dict, the same for the same names and shapes everywhere."""
    return {name: torch.from_numpy(random_tensor(name, shape)) for name, shape in shapes.items()}


def clip_shapes(config: dict[str, Any]) -> Shapes:
    """List names and shapes of the weights of open_clip's CLIP."""
    from open_clip import CLIP

    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in CLIP(**config).state_dict().items()}


def imagereward_shapes(size: BlipSize) -> Shapes:
    """List names and shapes of the weights in an ImageReward.pt.

    Left out: the constant position_ids and the two projections, which the reward does not use.
    """
    shapes: Shapes = {}
    width = size.image_width
    vision = "blip.visual_encoder."
    shapes[f"{vision}cls_token"] = (1, 1, width)
    shapes[f"{vision}pos_embed"] = (1, (224 // size.patch) ** 2 + 1, width)
    shapes[f"{vision}patch_embed.proj.weight"] = (width, 3, size.patch, size.patch)
    shapes[f"{vision}patch_embed.proj.bias"] = (width,)
    for layer in range(size.image_depth):
        block = f"{vision}blocks.{layer}."
        shapes.update(_norm(f"{block}norm1", width))
        shapes.update(_linear(f"{block}attn.qkv", width, 3 * width))
        shapes.update(_linear(f"{block}attn.proj", width, width))
        shapes.update(_norm(f"{block}norm2", width))
        shapes.update(_linear(f"{block}mlp.fc1", width, 4 * width))
        shapes.update(_linear(f"{block}mlp.fc2", 4 * width, width))
    shapes.update(_norm(f"{vision}norm", width))
    shapes.update(_text_shapes(size))
    shapes.update(_head("mlp.layers", size.text_width))
    return shapes


def _text_shapes(size: BlipSize) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = size.text_width
    text = "blip.text_encoder."
    yield f"{text}embeddings.word_embeddings.weight", (size.vocabulary, width)
    yield f"{text}embeddings.position_embeddings.weight", (512, width)
    yield from _norm(f"{text}embeddings.LayerNorm", width)
    for layer in range(size.text_depth):
        block = f"{text}encoder.layer.{layer}."
        for attention, source in (("attention", width), ("crossattention", size.image_width)):
            yield from _linear(f"{block}{attention}.self.query", width, width)
            yield from _linear(f"{block}{attention}.self.key", source, width)
            yield from _linear(f"{block}{attention}.self.value", source, width)
            yield from _linear(f"{block}{attention}.output.dense", width, width)
            yield from _norm(f"{block}{attention}.output.LayerNorm", width)
        yield from _linear(f"{block}intermediate.dense", width, 4 * width)
        yield from _linear(f"{block}output.dense", 4 * width, width)
        yield from _norm(f"{block}output.LayerNorm", width)


def _head(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The perceptron that both scorers end with; what lies between its layers has no weights."""
    sizes = (width, 1024, 128, 64, 16, 1)
    for place, ins, outs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        yield from _linear(f"{name}.{place}", ins, outs)


def _linear(name: str, ins: int, outs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outs, ins)
    yield f"{name}.bias", (outs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)

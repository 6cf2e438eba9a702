"""Computed, not measured: what the six recipes cost on 8 GPUs of 80 GB, in FLOPs, bytes and hours,
what a pair costs of every base, and what share of an evaluation is scoring.

    python scripts/bench/cost_model.py [--out FILE.json] [--utilisation 0.4]

Every model is built on the meta device at its true size and its forward pass is counted by
torch.utils.flop_counter (a multiply-add is two FLOPs; convolutions and matrix products only,
attention included; of text encoders two FLOPs a weight of a linear layer and token). From those
counts:

- a backward pass costs twice the forward pass, or once where weights have no gradient (LoRA: the
  adapters' own products are left out); gradient checkpointing adds one forward pass;
- a pair is two images: two UNet samples trained, two by the reference, two VAE encodings, one
  caption;
- a cache is built once, every image in two views (flipped or not), every caption once; it then
  serves a run;
- an image of an evaluation is its caption, two UNet samples a step and a VAE decoding; its scores
  are a forward pass of each of the five published scorers, without the heads of linear maps;
- hours are FLOPs / (GPUs x the peak in bf16 x --utilisation): data loading, exchange of gradients
  and checkpoints are taken to hide behind computation. The utilisation is an assumption, the same
  for every row: ratios between rows do not depend on it.

Bytes are what a GPU holds (scripts/bench/memory.py), what is read from disk and what a GPU sends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench import common
from scripts.bench.memory import GIB, Counted, Setting, bytes_by_part
from scripts.bench.true_size import (
    BASES,
    build_denoiser,
    build_text_encoders,
    build_vae,
    call_on_meta,
)
from sdpo.common.errors import run_main
from sdpo.common.flags import Check, flag, parse
from sdpo.config.families import FAMILIES

GPUS = 8
# Dense bf16 FLOP/s as the vendor gives them.
PEAK = {"A100": 312e12, "H100": 989e12}
STEPS, PAIRS_PER_PROCESS, ACCUMULATION = 2000, 8, 32
PAIRS = STEPS * PAIRS_PER_PROCESS * ACCUMULATION * GPUS
# Pick-a-Pic v2: rows with images and their size on disk.
ROWS, DATASET_BYTES = 959_000, 335e9
TOKENS = 77
TEXT_WIDTH = {"sd15": 768, "sdxl": 2048 + 1280 / TOKENS}  # per token; SDXL's pooled output once
# What of a UNet sees neither noise nor image.
COMMON = ("attn2.to_k", "attn2.to_v", ".time_embedding", ".time_emb_proj", ".add_embedding")
IMAGE_STEPS = 50  # of the published evaluation
METHODS = ("diffusion-dpo", "dspo", "dmpo")
RECIPES = {f"{family} {method}": family for family in TEXT_WIDTH for method in METHODS}
# Name, with a cache, with LoRA.
WAYS = (
    ("plain", False, False),
    ("cache", True, False),
    ("LoRA", False, True),
    ("cache, LoRA", True, True),
)


@dataclass(frozen=True)
class Options:
    """The program's flags."""

    utilisation: float = flag(
        0.4, "of the peak", check=Check("be above 0 and at most 1", lambda v: 0 < v <= 1)
    )
    out: Path = flag(Path("output/bench/cost_model.json"), "the figures", record=False)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass: one UNet sample, one image encoded, one caption encoded."""

    unet: float
    vae: float
    text: float


def count(name: str) -> Flops:
    """Count a base's forward passes at its training resolution."""
    import torch

    base = BASES[name]
    with torch.device("meta"):
        denoiser, vae = build_denoiser(name), build_vae(name)
        frames = (1,) if name == "qwen-image" else ()
        pixels = torch.empty(1, 3, *frames, base.resolution, base.resolution)
        encoders = build_text_encoders(name)
    return Flops(
        unet=flops_of(lambda: call_on_meta(name, denoiser, base.resolution, 1, torch.float32)),
        vae=flops_of(lambda: vae.encode(pixels)),
        text=sum(2.0 * base.tokens * linear_weights(encoder) for encoder in encoders),
    )


def image_flops(name: str, f: Flops, steps: int = IMAGE_STEPS) -> float:
    """Count what it costs to make an image at a base's resolution, guided."""
    import torch

    base = BASES[name]
    with torch.device("meta"):
        vae = build_vae(name)
        latents = torch.empty(1, base.channels, base.resolution // 8, base.resolution // 8)
    return f.text + steps * 2 * f.unet + flops_of(lambda: vae.decode(latents))


def scorer_flops() -> dict[str, float]:
    """Count what it costs to score an image, by published scorer."""
    import open_clip
    import torch
    from transformers import (
        BlipTextConfig,
        BlipTextModel,
        BlipVisionConfig,
        BlipVisionModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    large |= {"num_attention_heads": 16, "image_size": 224}
    with torch.device("meta"):
        huge = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**large, patch_size=14))
        vision = BlipVisionModel(BlipVisionConfig(**large, patch_size=16))
        reading = BlipTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            encoder_hidden_size=1024,
            is_decoder=True,
        )
        text = BlipTextModel(reading, add_pooling_layer=False)
        pixels = torch.empty(1, 3, 224, 224)
        tokens, words = (torch.zeros(1, n, dtype=torch.long) for n in (TOKENS, 35))

    def read() -> None:
        seen = vision(pixel_values=pixels).last_hidden_state
        text(input_ids=words, encoder_hidden_states=seen)

    in_vit_h = flops_of(lambda: huge(pixels, tokens))
    return {
        **dict.fromkeys(("pickscore", "hpsv2", "clip"), in_vit_h),
        "aesthetics": flops_of(lambda: clip(pixel_values=pixels)),
        "imagereward": flops_of(read),
    }


def linear_weights(encoder: Any) -> int:
    """Count the weights of linear layers that a caption's tokens go through."""
    from torch import nn

    return sum(
        module.weight.numel()
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and "visual" not in name and "lm_head" not in name
    )


def flops_of(call: Callable[[], Any]) -> float:
    """Count the FLOPs of one call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def common_share(name: str) -> float:
    """Compute the share of a UNet's forward pass that hangs on caption and time alone, which the
    samples of a pair have in common: keys and values of the cross-attention, embeddings of time."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    base = BASES[name]
    with torch.device("meta"), torch.no_grad():
        unet = build_denoiser(name)
        with FlopCounterMode(display=False) as counter:
            call_on_meta(name, unet, base.resolution, 1, torch.float32)
    return (
        sum(
            sum(found.values())
            for module, found in counter.get_flop_counts().items()
            if module.endswith(COMMON)
        )
        / counter.get_total_flops()
    )


def pair_flops(f: Flops, checkpointing: bool, cached: bool, lora: bool) -> float:
    """Add up the FLOPs of one pair."""
    trained = 1 + (1 if lora else 2) + (1 if checkpointing else 0)
    encoding = 0.0 if cached else 2 * f.vae + f.text
    return 2 * f.unet * (trained + 1) + encoding


def cache_flops(f: Flops) -> float:
    """Add up the FLOPs of encoding the whole dataset: four VAE passes a row, one caption."""
    return ROWS * (4 * f.vae + f.text)


def cache_bytes(family: str) -> float:
    """Add up the bytes of the whole dataset's cache: two images in two views as mean and deviation
    in half precision, and a caption's embedding; captions that occur twice are counted twice."""
    latents = 2 * 2 * 2 * 4 * (BASES[family].resolution // 8) ** 2 * 2
    return ROWS * (latents + TOKENS * TEXT_WIDTH[family] * 2)


def gpu_bytes(family: str) -> float:
    """Count what one GPU holds at the peak of the official recipe's micro-step."""
    optimizer = "AdamW" if family == "sd15" else "Adafactor"
    setting = Setting(family, optimizer, PAIRS_PER_PROCESS, family == "sdxl")
    counted = Counted(family, None)
    activations = counted.activations(setting.pairs, setting.checkpointing)
    return sum(bytes_by_part(counted, setting, activations))


def sent_bytes(family: str) -> float:
    """Add up what each GPU sends in a run: a ring all-reduce of float32 gradients once a step."""
    return STEPS * 2 * (GPUS - 1) / GPUS * 4 * BASES[family].parameters


def recipe(family: str, f: Flops, utilisation: float) -> dict[str, Any]:
    """Compute what one recipe costs, in four ways."""
    checkpointing = family == "sdxl"
    ways = {}
    for name, cached, lora in WAYS:
        run = PAIRS * pair_flops(f, checkpointing, cached, lora)
        once = cache_flops(f) if cached else 0.0
        ways[name] = {
            "flops": run,
            "cache_flops_once": once,
            "hours": _hours(run, utilisation),
            "cache_hours_once": _hours(once, utilisation),
        }
    return {
        "ways": ways,
        "gpu_bytes_plain": gpu_bytes(family),
        "read_bytes_plain": DATASET_BYTES * PAIRS / ROWS,
        "cache_bytes": cache_bytes(family),
        "sent_bytes_per_gpu": sent_bytes(family),
    }


def _hours(flops: float, utilisation: float) -> dict[str, float]:
    return {gpu: flops / (GPUS * peak * utilisation) / 3600 for gpu, peak in PEAK.items()}


def pair_costs(name: str, f: Flops, utilisation: float) -> dict[str, dict[str, float]]:
    """Compute what a pair costs with gradient checkpointing: FLOPs, and pairs a GPU's second."""
    lora = FAMILIES[BASES[name].family].lora_targets
    found = {}
    for way, cached, adapters in WAYS:
        if adapters and not lora:
            continue
        flops = pair_flops(f, True, cached, adapters)
        rates = {gpu: peak * utilisation / flops for gpu, peak in PEAK.items()}
        found[way] = {"flops": flops, **rates}
    return found


def show_pairs(pairs: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the table of all bases."""
    rows = [
        [BASES[name].label, way, f"{cost['flops'] / 1e12:.1f}", *(f"{cost[g]:.3g}" for g in PEAK)]
        for name, ways in pairs.items()
        for way, cost in ways.items()
    ]
    print()
    head = ["a pair, gradient checkpointing", "way", "TFLOP", *(f"pairs/s, {g}" for g in PEAK)]
    common.print_table(head, rows)


def show_images(images: dict[str, dict[str, float]]) -> None:
    """Print what an image of an evaluation costs, and its five scores."""
    rows = [
        [
            BASES[name].label,
            f"{cost['image'] / 1e12:.1f}",
            f"{cost['scores'] / 1e12:.2f}",
            f"{cost['scores'] / (cost['image'] + cost['scores']):.1%}",
        ]
        for name, cost in images.items()
    ]
    print()
    head = [f"an image, {IMAGE_STEPS} steps", "TFLOP", "five scores", "share of both"]
    common.print_table(head, rows)


def show(flops: dict[str, Flops], costs: dict[str, Any], utilisation: float) -> None:
    """Print the tables."""
    print(f"Computed. {GPUS} GPUs at {utilisation:.0%} of peak bf16, {PAIRS:,} pairs a run.\n")
    rows = [[name, *(f"{n / 1e12:.3f}" for n in asdict(f).values())] for name, f in flops.items()]
    common.print_table(["forward pass, TFLOP", "UNet", "VAE encoder", "text"], rows)
    rows = []
    for name, family in RECIPES.items():
        ways = costs[family]["ways"]
        for way, entry in ways.items():
            hours = [entry[k][gpu] for k in ("hours", "cache_hours_once") for gpu in PEAK]
            share = entry["flops"] / ways["plain"]["flops"]
            cells = [f"{share:.2f}", *(f"{n:.1f}" for n in (entry["flops"] / 1e18, *hours))]
            rows.append([name, way, *cells])
    print()
    head = [f"h {gpu}" for gpu in PEAK] + [f"+cache h {gpu}" for gpu in PEAK]
    common.print_table(["recipe", "way", "FLOPs/plain", "EFLOP", *head], rows)
    rows = [
        [
            family,
            f"{cost['gpu_bytes_plain'] / GIB:.0f}",
            f"{cost['read_bytes_plain'] / 1e12:.1f}",
            f"{cost['cache_bytes'] / 1e9:.0f}",
            f"{cost['sent_bytes_per_gpu'] / 1e12:.1f}",
        ]
        for family, cost in costs.items()
    ]
    print()
    common.print_table(
        ["bytes", "GiB a GPU", "TB read plain", "GB cache", "TB sent by a GPU"], rows
    )


def main() -> int:
    """Count, print, write."""
    options = parse(Options, sys.argv[1:], "cost_model.py", __doc__)
    common.check_out(options.out)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    flops = {name: count(name) for name in BASES}
    costs = {name: recipe(name, flops[name], options.utilisation) for name in TEXT_WIDTH}
    show(flops, costs, options.utilisation)
    pairs = {name: pair_costs(name, f, options.utilisation) for name, f in flops.items()}
    show_pairs(pairs)
    scores = scorer_flops()
    images = {
        name: {"image": image_flops(name, flops[name]), "scores": sum(scores.values())}
        for name in TEXT_WIDTH
    }
    show_images(images)
    shares = {name: common_share(name) for name in TEXT_WIDTH}
    told = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    print(f"\nof a UNet's forward pass hangs on caption and time alone: {told}")
    result = {
        "computed": True,
        "assumptions": {"gpus": GPUS, "peak_flops": PEAK, "utilisation": options.utilisation},
        "pairs": PAIRS,
        "forward_flops": {family: asdict(f) for family, f in flops.items()},
        "recipes": {name: costs[family] for name, family in RECIPES.items()},
        "pair": pairs,
        "common_share": shares,
        "scorers": scores,
        "evaluation": images,
    }
    common.write_result(options.out, "cost_model.py", result)
    return 0


if __name__ == "__main__":
    run_main(main, "cost_model.py")

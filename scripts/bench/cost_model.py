"""Computed, not measured: what the six recipes cost on 8 GPUs of 80 GB, in FLOPs, bytes and hours.

    python scripts/bench/cost_model.py [--out FILE.json] [--utilisation 0.4]

Every model is built on the meta device at its true size and its forward pass is counted by
torch.utils.flop_counter (a multiply-add is two FLOPs; convolutions and matrix products only,
attention included). From those counts:

- a backward pass costs twice the forward pass, or once where weights have no gradient (LoRA: the
  adapters' own products are left out); gradient checkpointing adds one forward pass;
- a pair is two images: two UNet samples trained, two by the reference, two VAE encodings, one
  caption;
- a cache is built once, every image in two views (flipped or not), every caption once; it then
  serves a run;
- hours are FLOPs / (GPUs x the peak in bf16 x --utilisation): data loading, exchange of gradients
  and checkpoints are taken to hide behind computation. The utilisation is an assumption, the same
  for every row: ratios between rows do not depend on it.

Bytes are what a GPU holds (scripts/bench/memory.py), what is read from disk and what a GPU sends.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from scripts.bench.common import parser, print_table, write_result
from sdpo.common.errors import UserError, run_main

GPUS = 8
# Dense bf16 FLOP/s as the vendor gives them.
PEAK = {"A100": 312e12, "H100": 989e12}
STEPS, PAIRS_PER_PROCESS, ACCUMULATION = 2000, 8, 32
PAIRS = STEPS * PAIRS_PER_PROCESS * ACCUMULATION * GPUS
# Pick-a-Pic v2: rows with images and their size on disk.
ROWS, DATASET_BYTES = 959_000, 335e9
RESOLUTION = {"sd15": 512, "sdxl": 1024}
TOKENS = 77
TEXT_WIDTH = {"sd15": 768, "sdxl": 2048 + 1280 / TOKENS}  # per token; SDXL's pooled output once
RECIPES = [
    (f"{family} {method}", family)
    for family in ("sd15", "sdxl")
    for method in ("diffusion-dpo", "dspo", "dmpo")
]


@dataclass(frozen=True)
class Flops:
    """Of one forward pass: one UNet sample, one image encoded, one caption encoded."""

    unet: float
    vae: float
    text: float


def count(family: str) -> Flops:
    """Count a family's forward passes at its training resolution."""
    import torch

    from scripts.bench.true_pipeline import build_second_encoder
    from scripts.bench.true_size import build_sd15_frozen, build_unet

    with torch.device("meta"):
        unet = build_unet(family)
        side = RESOLUTION[family] // 8
        inputs: dict[str, Any] = {
            "sample": torch.empty(1, 4, side, side),
            "timestep": torch.zeros(1, dtype=torch.long),
            "encoder_hidden_states": torch.empty(1, TOKENS, unet.config.cross_attention_dim),
        }
        if family == "sdxl":
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
            inputs["added_cond_kwargs"] = added
        frozen = build_sd15_frozen(with_tokenizer=False)
        encoders = frozen.text_encoders + ([build_second_encoder()] if family == "sdxl" else [])
        pixels = torch.empty(1, 3, RESOLUTION[family], RESOLUTION[family])
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        return Flops(
            unet=forward_flops(unet, **inputs),
            vae=forward_flops(frozen.vae.encode, x=pixels),
            text=sum(forward_flops(encoder, input_ids=ids) for encoder in encoders),
        )


def forward_flops(module: Any, **inputs: Any) -> float:
    """FLOPs of one call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return float(counter.get_total_flops())


def pair_flops(f: Flops, checkpointing: bool, cached: bool, lora: bool) -> float:
    """FLOPs of one pair."""
    trained = 1 + (1 if lora else 2) + (1 if checkpointing else 0)
    encoding = 0.0 if cached else 2 * f.vae + f.text
    return 2 * f.unet * (trained + 1) + encoding


def cache_flops(f: Flops) -> float:
    """FLOPs of encoding the whole dataset: four VAE passes a row, one caption."""
    return ROWS * (4 * f.vae + f.text)


def cache_bytes(family: str) -> float:
    """Bytes of the whole dataset's cache: two images in two views as mean and deviation in half
    precision, and a caption's embedding; captions that occur twice are counted twice."""
    latents = 2 * 2 * 2 * 4 * (RESOLUTION[family] // 8) ** 2 * 2
    return ROWS * (latents + TOKENS * TEXT_WIDTH[family] * 2)


def gpu_bytes(family: str) -> float:
    """What one GPU holds at the peak of the official recipe's micro-step."""
    from scripts.bench.memory import FROZEN_PARAMETERS, OPTIMIZER_BYTES, activation_bytes
    from scripts.bench.true_size import PARAMETERS

    n, optimizer = PARAMETERS[family], "AdamW" if family == "sd15" else "Adafactor"
    # float32 weights and gradients, bf16 copies under autocast, a bf16 reference.
    held = (4 + 2 + 4 + OPTIMIZER_BYTES[optimizer] + 2) * n + 2 * FROZEN_PARAMETERS[family]
    samples = 2 * PAIRS_PER_PROCESS
    return held + activation_bytes(family, RESOLUTION[family], samples, family == "sdxl")


def sent_bytes(family: str) -> float:
    """What each GPU sends in a run: a ring all-reduce of float32 gradients once a step."""
    from scripts.bench.true_size import PARAMETERS

    return STEPS * 2 * (GPUS - 1) / GPUS * 4 * PARAMETERS[family]


def recipe(family: str, f: Flops, utilisation: float) -> dict[str, Any]:
    """Costs of one recipe, in four ways."""
    checkpointing = family == "sdxl"
    ways = {}
    for name, cached, lora in (
        ("plain", False, False),
        ("cache", True, False),
        ("LoRA", False, True),
        ("cache, LoRA", True, True),
    ):
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


def show(flops: dict[str, Flops], costs: dict[str, Any], utilisation: float) -> None:
    """Print the tables."""
    print(f"Computed. {GPUS} GPUs at {utilisation:.0%} of peak bf16, {PAIRS:,} pairs a run.\n")
    rows = [
        [family, *(f"{value / 1e12:.3f}" for value in (f.unet, f.vae, f.text))]
        for family, f in flops.items()
    ]
    print_table(["forward pass, TFLOP", "UNet", "VAE encoder", "text"], rows)
    rows = []
    for name, family in RECIPES:
        cost = costs[family]
        for way, entry in cost["ways"].items():
            rows.append(
                [
                    name,
                    way,
                    f"{entry['flops'] / cost['ways']['plain']['flops']:.2f}",
                    f"{entry['flops'] / 1e18:.1f}",
                    *(f"{entry['hours'][gpu]:.1f}" for gpu in PEAK),
                    *(f"{entry['cache_hours_once'][gpu]:.1f}" for gpu in PEAK),
                ]
            )
    print()
    hours = [f"h {gpu}" for gpu in PEAK] + [f"+cache h {gpu}" for gpu in PEAK]
    print_table(["recipe", "way", "FLOPs/plain", "EFLOP", *hours], rows)
    print()
    head = ["bytes", "GiB a GPU", "TB read plain", "GB cache", "TB sent by a GPU"]
    rows = [
        [
            family,
            f"{cost['gpu_bytes_plain'] / 2**30:.0f}",
            f"{cost['read_bytes_plain'] / 1e12:.1f}",
            f"{cost['cache_bytes'] / 1e9:.0f}",
            f"{cost['sent_bytes_per_gpu'] / 1e12:.1f}",
        ]
        for family, cost in costs.items()
    ]
    print_table(head, rows)


def parse() -> argparse.Namespace:
    """The program's flags.

    Raises:
        UserError: on a utilisation that is no share.
    """
    found = parser("cost_model.py", __doc__)
    found.add_argument("--utilisation", type=float, default=0.4, help="of the peak, default: 0.4")
    args = found.parse_args()
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation must be above 0 and at most 1, got {args.utilisation}")
    return args


def main() -> int:
    """Count, print, write."""
    args = parse()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    flops = {family: count(family) for family in RESOLUTION}
    costs = {family: recipe(family, f, args.utilisation) for family, f in flops.items()}
    show(flops, costs, args.utilisation)
    result = {
        "computed": True,
        "assumptions": {"gpus": GPUS, "peak_flops": PEAK, "utilisation": args.utilisation},
        "pairs": PAIRS,
        "forward_flops": {family: vars(f) for family, f in flops.items()},
        "recipes": {name: costs[family] for name, family in RECIPES},
    }
    write_result(args.out, "cost_model.py", result)
    return 0


if __name__ == "__main__":
    run_main(main, "cost_model.py")

"""Computed memory of a training step at true size: weights, gradients, optimizer, activations.

    python scripts/bench/memory.py

Nothing is allocated: the UNets are built on the meta device and the bytes that autograd keeps for
the backward pass are added up. Attention counts as a fused kernel (queries, keys, values, output,
one statistic per row). Not counted: work space, fragmentation, the CUDA context (leave 2 to 3 GiB)
and, with several processes, the buckets in which gradients are exchanged (as much as `grads`).
`frozen` is the reference (none with --lora_rank), VAE and text encoders; training from a latent
cache needs of these the reference alone (0.4 GiB less for SD1.5, 1.7 GiB for SDXL). --use_ema adds
4 bytes a trained weight.
"""

from __future__ import annotations

from scripts.bench.common import print_table
from scripts.bench.true_size import PARAMETERS, RESOLUTION
from sdpo.common.cli import Parser
from sdpo.common.errors import run_main

GIB = 2**30
# Bytes per parameter held by the optimizer; Adafactor's factored second moments are under 1 %.
OPTIMIZER_BYTES = {"AdamW": 8, "Adafactor": 0}
# The frozen parts in bf16: VAE and text encoders, parameters of the published models.
FROZEN_PARAMETERS = {"sd15": 83_653_863 + 123_060_480, "sdxl": 83_653_863 + 817_719_808}
# Family, optimizer, pairs, --gradient_checkpointing, --lora_rank.
ROWS = (
    ("sd15", "AdamW", 8, False, None),
    ("sd15", "AdamW", 8, True, None),
    ("sd15", "AdamW", 1, True, None),
    ("sd15", "Adafactor", 1, True, None),
    ("sdxl", "Adafactor", 8, True, None),
    ("sdxl", "Adafactor", 1, True, None),
    ("sd15", "AdamW", 8, False, 16),
    ("sd15", "AdamW", 8, True, 16),
    ("sd15", "AdamW", 8, True, 64),
    ("sd15", "AdamW", 1, False, 16),
    ("sd15", "AdamW", 1, True, 64),
    ("sdxl", "AdamW", 8, True, 16),
    ("sdxl", "AdamW", 1, False, 16),
    ("sdxl", "AdamW", 1, True, 16),
    ("sdxl", "AdamW", 1, True, 64),
)
PARTS = ("weights", "casts", "grads", "optim", "frozen", "activ.")


def bytes_by_part(
    family: str, optimizer: str, pairs: int, checkpointing: bool, rank: int | None
) -> tuple[int, ...]:
    """Count the bytes of `PARTS` at the peak of a micro-step of `pairs` pairs."""
    from scripts.bench.activations import activation_bytes, build_trained

    n = PARAMETERS[family]
    parameters = build_trained(family, rank).parameters()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # What is trained is float32, what it adapts bf16, and so is the reference. Under autocast the
    # first has bf16 copies for as long as a step lasts.
    return (
        4 * trained + (2 * n if rank else 0),
        2 * trained,
        4 * trained,
        OPTIMIZER_BYTES[optimizer] * trained,
        (0 if rank else 2 * n) + 2 * FROZEN_PARAMETERS[family],
        activation_bytes(family, RESOLUTION[family], 2 * pairs, checkpointing, rank),
    )


def main() -> int:
    """Print the table."""
    Parser("memory.py", __doc__).parse_args()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    rows = []
    for family, optimizer, pairs, checkpointing, rank in ROWS:
        parts = bytes_by_part(family, optimizer, pairs, checkpointing, rank)
        cells = [family, optimizer, pairs, "yes" if checkpointing else "no", rank or "-"]
        rows.append([*cells, *(f"{part / GIB:.1f}" for part in (*parts, sum(parts)))])
    head = ["model", "optimizer", "pairs", "ckpt", "rank", *PARTS, "total GiB"]
    print_table(head, rows)
    return 0


if __name__ == "__main__":
    run_main(main, "memory.py")

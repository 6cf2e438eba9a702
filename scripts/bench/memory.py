"""Computed memory of a training step at true size: weights, gradients, optimizer, activations.

    python scripts/bench/memory.py [--bases sdxl flux]

The first table is of the official recipes and smaller cards, the second of every base, one pair at
a time with --gradient_checkpointing: all weights, adapters of rank 16, and these over a base held
in 8 or 4 bits; on one GPU and, weights divided by FSDP2, on eight.

Nothing is allocated: the denoisers are built on the meta device and the bytes that autograd keeps
for the backward pass are added up. Attention counts as a fused kernel (queries, keys, values,
output, one statistic per row). Not counted: work space, fragmentation, the CUDA context (leave 2 to
3 GiB) and, with several processes, the buckets in which gradients are exchanged (as much as
`grads`). `ref.` is the reference (none with --lora_rank, or with --cache_reference), `frozen` VAE
and text encoders, which training from a latent cache does without. --use_ema adds 4 bytes a trained
weight. Under FSDP2 weights, gradients and optimizer are an eighth, beside two blocks that are whole
in float32; reference and bf16 copies are counted whole. Of weights in few bits the linear layers of
the denoiser are counted at 1 byte, or 4.5 bits with a scale for every 64; all others at 2 bytes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from scripts.bench.common import print_table
from scripts.bench.true_size import BASES
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import flag, parse
from sdpo.config.families import FAMILIES

GIB = 2**30
# Bytes per parameter held by the optimizer; Adafactor's factored second moments are under 1 %.
OPTIMIZER_BYTES = {"AdamW": 8, "Adafactor": 0}
# Bytes of a frozen weight by the bits in which it is held.
HELD_BYTES = {16: 2.0, 8: 1.0, 4: 4.5 / 8}
RANK, DIVIDED = 16, 8
PARTS = ("weights", "casts", "grads", "optim", "ref.", "frozen", "activ.")


@dataclass(frozen=True)
class Setting:
    """What a row is computed for."""

    base: str
    optimizer: str
    pairs: int
    checkpointing: bool
    rank: int | None = None
    bits: int = 16


ROWS = (
    Setting("sd15", "AdamW", 8, False),
    Setting("sd15", "AdamW", 8, True),
    Setting("sd15", "AdamW", 1, True),
    Setting("sd15", "Adafactor", 1, True),
    Setting("sdxl", "Adafactor", 8, True),
    Setting("sdxl", "Adafactor", 1, True),
    Setting("sd15", "AdamW", 8, True, 16),
    Setting("sd15", "AdamW", 1, True, 64),
    Setting("sdxl", "AdamW", 8, True, 16),
    Setting("sdxl", "AdamW", 1, True, 16),
)


@dataclass(frozen=True)
class Options:
    """The program's flags."""

    bases: tuple[str, ...] = flag(
        tuple(BASES), f"of the second table: {' '.join(BASES)}", metavar="NAME", shown="all"
    )


class Counted:
    """A denoiser on the meta device, and the numbers in it."""

    def __init__(self, base: str, rank: int | None) -> None:
        from torch import nn

        from scripts.bench.activations import build_trained

        self.base, self.rank = base, rank
        self.module = build_trained(base, rank)
        parameters = list(self.module.parameters())
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.held = sum(p.numel() for p in parameters if not p.requires_grad)
        self.linear = sum(
            p.numel()
            for m in self.module.modules()
            if isinstance(m, nn.Linear)
            for p in [m.weight]
            if not p.requires_grad
        )
        units = FAMILIES[BASES[base].family].units
        self.largest_unit = max(
            sum(p.numel() for p in m.parameters())
            for m in self.module.modules()
            if type(m).__name__ in units
        )

    def activations(self, pairs: int, checkpointing: bool) -> int:
        """Count the bytes of activations; the module is changed by it."""
        from scripts.bench.activations import activation_bytes

        side = BASES[self.base].resolution
        return activation_bytes(self.base, self.module, side, 2 * pairs, checkpointing)


def bytes_by_part(
    counted: Counted, setting: Setting, activations: int, gpus: int = 1
) -> tuple[float, ...]:
    """Count the bytes of `PARTS` on each GPU at the peak of a micro-step."""
    base, trained = BASES[setting.base], counted.trained
    # What is trained is float32, with bf16 copies for as long as a step lasts, as autocast keeps
    # them; what it adapts is bf16 or less, the reference bf16.
    held = 2 * (counted.held - counted.linear) + HELD_BYTES[setting.bits] * counted.linear
    whole = 2 * (2 if setting.rank else 4) * counted.largest_unit if gpus > 1 else 0
    frozen = base.vae_parameters + sum(encoder.parameters for encoder in base.text)
    return (
        (4 * trained + held) / gpus + whole,
        2 * trained,
        4 * trained / gpus,
        OPTIMIZER_BYTES[setting.optimizer] * trained / gpus,
        0 if setting.rank else 2 * base.parameters,
        2 * frozen,
        activations,
    )


def recipe_rows() -> list[list[Any]]:
    """Make the first table's rows."""
    rows = []
    for setting in ROWS:
        counted = Counted(setting.base, setting.rank)
        activations = counted.activations(setting.pairs, setting.checkpointing)
        parts = bytes_by_part(counted, setting, activations)
        cells = [setting.base, setting.optimizer, setting.pairs]
        cells += ["yes" if setting.checkpointing else "no", setting.rank or "-"]
        rows.append([*cells, *(f"{part / GIB:.1f}" for part in (*parts, sum(parts)))])
    return rows


def base_rows(name: str) -> list[list[Any]]:
    """Make the second table's rows of a base: `PARTS` and total on one GPU, the total without VAE
    and text encoders, and both on eight."""
    rows = []
    for rank in (None, RANK) if FAMILIES[BASES[name].family].lora_targets else (None,):
        counted = Counted(name, rank)
        activations = counted.activations(1, True)
        for bits in (16, 8, 4) if rank else (16,):
            setting = Setting(name, "AdamW", 1, True, rank, bits)
            totals: list[float] = []
            for gpus in (1, DIVIDED) if bits == 16 else (1,):
                parts = bytes_by_part(counted, setting, activations, gpus)
                if gpus == 1:
                    one = parts
                totals += [sum(parts), sum(parts) - parts[PARTS.index("frozen")]]
            way = "all weights" if rank is None else f"LoRA {rank}"
            way += "" if bits == 16 else f", {bits} bits"
            cells = [f"{value / GIB:.1f}" for value in (*one, *totals)]
            rows.append([BASES[name].label, way, *cells, *["-"] * (len(PARTS) + 4 - len(cells))])
    return rows


def main() -> int:
    """Print the tables."""
    options = parse(Options, sys.argv[1:], "memory.py", __doc__)
    for name in options.bases:
        if name not in BASES:
            raise UserError(f"--bases: there is no {name}; there are: {' '.join(BASES)}")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    head = ["model", "optimizer", "pairs", "ckpt", "rank", *PARTS, "total GiB"]
    print_table(head, recipe_rows())
    print()
    head = ["model", "trained", *PARTS, "total", "cached", f"of {DIVIDED}", "cached"]
    print_table(head, [row for name in options.bases for row in base_rows(name)])
    return 0


if __name__ == "__main__":
    run_main(main, "memory.py")

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

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]

GIB = 2**30
# Bytes per parameter held by the optimizer; Adafactor's factored second moments are under 1 %.
OPTIMIZER_BYTES = {"AdamW": 8, "Adafactor": 0}
# The frozen parts in bf16: VAE and text encoders, parameters of the published models.
FROZEN_PARAMETERS = {"sd15": 83_653_863 + 123_060_480, "sdxl": 83_653_863 + 817_719_808}
RESOLUTION = {"sd15": 512, "sdxl": 1024}
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


def fused_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for scaled_dot_product_attention: keeps what a fused kernel keeps."""
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
            return out

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return ctx.saved_tensors[:3]

    return Attention.apply(query, key, value)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What CUDA's autocast to bf16 does to dtypes, which it does not do on the meta device: norms
    in float32, matrix products and convolutions in bf16; and fused attention."""
    import torch.nn.functional as F

    norm_of = {"group_norm": F.group_norm, "layer_norm": F.layer_norm}
    product_of = {"linear": F.linear, "conv2d": F.conv2d}

    def norm(function: Any) -> Any:
        def wide(x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
            return function(x.float(), shape, weight.float(), bias.float(), eps)

        return wide

    def product(function: Any) -> Any:
        return lambda x, *rest: function(x.bfloat16(), *rest)

    patches = {"scaled_dot_product_attention": fused_attention}
    patches |= {name: norm(f) for name, f in norm_of.items()}
    patches |= {name: product(f) for name, f in product_of.items()}
    with mock.patch.multiple(F, **patches):
        yield


class KeptBytes:
    """Adds up the storages that autograd keeps, and the most that one checkpointed block adds."""

    def __init__(self, unet: Any) -> None:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        self.own = {p.untyped_storage()._cdata for p in unet.parameters()}
        self.storages: dict[int, Any] = {}
        self.largest_block = 0
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def keep(self, tensor: Any) -> Any:
        """The pack hook."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages.setdefault(storage._cdata, storage)
        return tensor

    def total(self) -> int:
        """Bytes kept so far."""
        return sum(s.nbytes() for s in self.storages.values())

    def _enter(self, *_: Any) -> None:
        self._before = self.total()

    def _leave(self, *_: Any) -> None:
        self.largest_block = max(self.largest_block, self.total() - self._before)


def adapt(unet: Any, rank: int) -> Any:
    """`unet`, its weights frozen and train.py's default adapters around its attention."""
    from peft import LoraConfig
    from sdpo.weight_flags import LORA_TARGETS

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))
    return unet


def adapter_parameters(family: str, rank: int) -> int:
    """The number of parameters that --lora_rank trains."""
    import torch

    from scripts.bench.true_size import build_unet

    with torch.device("meta"):
        unet = adapt(build_unet(family), rank)
    return sum(p.numel() for p in unet.parameters() if p.requires_grad)


def activation_bytes(
    family: str, resolution: int, samples: int, checkpointing: bool, rank: int | None = None
) -> int:
    """Bytes of activations at the peak for `samples` images (two a pair), under bf16 autocast.

    With checkpointing: the inputs of all blocks, and the largest block computed again. With a rank:
    of adapters alone, so that most layers keep nothing.
    """
    import torch

    from scripts.bench.true_size import build_unet

    with torch.device("meta"):
        unet = build_unet(family)
        unet = (adapt(unet, rank) if rank else unet).bfloat16().train()
        side = resolution // 8
        width = unet.config.cross_attention_dim
        kwargs: dict[str, Any] = {
            "encoder_hidden_states": torch.empty(samples, 77, width).bfloat16()
        }
        if family == "sdxl":
            kwargs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(samples, 1280).bfloat16(),
                "time_ids": torch.empty(samples, 6).bfloat16(),
            }
        noisy = torch.empty(samples, 4, side, side).bfloat16()
        timesteps = torch.zeros(samples, dtype=torch.long)

        def kept_by_forward() -> KeptBytes:
            kept = KeptBytes(unet)
            with (
                as_on_a_gpu(),
                torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor),
            ):
                unet(noisy, timesteps, **kwargs)
            return kept

        whole = kept_by_forward()
        if not checkpointing:
            return whole.total()
        unet.enable_gradient_checkpointing()
        return kept_by_forward().total() + whole.largest_block


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()

    from scripts.bench.true_size import PARAMETERS

    head = ("model", "optimizer", "pairs", "ckpt", "rank", "weights", "casts", "grads", "optim")
    print(" ".join(f"{h:>10}" for h in (*head, "frozen", "activ.", "total GiB")))
    for family, optimizer, pairs, checkpointing, rank in ROWS:
        n = PARAMETERS[family]
        trained = adapter_parameters(family, rank) if rank else n
        # What is trained is float32, what it adapts bf16. Under autocast the former has bf16 copies
        # for as long as a step lasts.
        weights, casts, gradients = 4 * trained + (2 * n if rank else 0), 2 * trained, 4 * trained
        states = OPTIMIZER_BYTES[optimizer] * trained
        frozen = (0 if rank else 2 * n) + 2 * FROZEN_PARAMETERS[family]
        resolution = RESOLUTION[family]
        activations = activation_bytes(family, resolution, 2 * pairs, checkpointing, rank)
        parts = (weights, casts, gradients, states, frozen, activations)
        cells = [family, optimizer, str(pairs), "yes" if checkpointing else "no", str(rank or "-")]
        cells += [f"{part / GIB:.1f}" for part in (*parts, sum(parts))]
        print(" ".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    main()

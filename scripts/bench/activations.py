"""The bytes of activations that a training step at true size keeps, counted on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scripts.bench.true_size import BASES, build_denoiser, call_on_meta
from sdpo.config import ModelConfig
from sdpo.config.families import FAMILIES
from sdpo.models.lora import add_adapters

META = torch.device("meta")


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[:3]


class AsOnGpu(TorchFunctionMode):
    """Does to dtypes what CUDA's autocast to bf16 does, which it does not do on the meta device:
    norms in float32, matrix products, convolutions and attention in bf16; and fused attention."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the place of one call."""
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if function in (F.group_norm, F.layer_norm):
            args = [_wide(value) for value in args]
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        elif function in (F.linear, F.conv2d):
            args = [args[0].bfloat16(), *args[1:]]
        return function(*args, **kwargs)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _FusedAttention.apply(query.bfloat16(), key.bfloat16(), value.bfloat16())
    return out


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


class KeptBytes:
    """Adds up the storages that autograd keeps, and the most that one checkpointed block adds."""

    def __init__(self, denoiser: nn.Module, units: tuple[str, ...]) -> None:
        self.own = {p.untyped_storage()._cdata for p in denoiser.parameters()}
        self.storages: dict[int, Any] = {}
        self.largest_block = 0
        for module in denoiser.modules():
            if type(module).__name__ in units:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept; autograd's pack hook."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages.setdefault(storage._cdata, storage)
        return tensor

    def total(self) -> int:
        """Give the bytes kept so far."""
        return sum(s.nbytes() for s in self.storages.values())

    def _enter(self, *_: Any) -> None:
        self._before = self.total()

    def _leave(self, *_: Any) -> None:
        self.largest_block = max(self.largest_block, self.total() - self._before)


def build_trained(name: str, rank: int | None) -> Any:
    """Build a base's denoiser on the meta device; with a rank, frozen and with train.py's
    adapters."""
    with META:
        denoiser = build_denoiser(name)
    if rank:
        config = ModelConfig(
            lora_rank=rank,
            lora_alpha=float(rank),
            lora_target_modules=FAMILIES[BASES[name].family].lora_targets,
        )
        add_adapters(denoiser, config, 0, torch.bfloat16, META)
    return denoiser


def activation_bytes(
    name: str, denoiser: Any, resolution: int, samples: int, checkpointing: bool
) -> int:
    """Count the bytes of activations at the peak for `samples` images (two a pair), under bf16
    autocast.

    With checkpointing: the inputs of all blocks, and the largest block computed again.

    Args:
        denoiser: of `build_trained`; with adapters most layers keep nothing. It is cast to bf16.
    """
    denoiser.bfloat16().train()

    def kept_by_forward() -> KeptBytes:
        kept = KeptBytes(denoiser, FAMILIES[BASES[name].family].units)
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor)
        with AsOnGpu(), hooks:
            call_on_meta(name, denoiser, resolution, samples, torch.bfloat16)
        return kept

    whole = kept_by_forward()
    if not checkpointing:
        return whole.total()
    denoiser.enable_gradient_checkpointing()
    return kept_by_forward().total() + whole.largest_block

"""Frozen linear layers in 8 or 4 bits, for --quantize_base, in bitsandbytes' formats.

8bit: int8 with a float32 scale a row, LLM.int8's weights (Dettmers et al., NeurIPS 2022), 8 bits a
weight and 32 a row. 4bit: NF4 with a float32 scale for every 64 weights (Dettmers et al., QLoRA,
NeurIPS 2023), 4.5 bits a weight.

The weights alone are quantised: a product is that of the inputs and the weights brought back to the
run's dtype, in training and evaluation, with gradients and without, on every device. bitsandbytes'
own layers are not: LLM.int8 rounds the inputs too, on CPUs in evaluation alone, so that a run would
not start at margin zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line

BLOCK = 64  # weights of NF4 that share a scale


def quantize_linear_layers(
    module: nn.Module, bits: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Put `QuantizedLinear` on `device` in the place of the frozen linear layers below `module`.

    One weight at a time is whole on `device`. What is in other layers stays where it is.

    Args:
        bits: as --quantize_base takes them.
        dtype: of the biases, and of the weights outside of autocast.

    Raises:
        UserError: bitsandbytes cannot be imported.
    """
    _check_package()
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                setattr(parent, name, QuantizedLinear(layer, bits, dtype, device))


def _check_package() -> None:
    try:
        import bitsandbytes  # noqa: F401
    # A library of CUDA's that it does not find raises RuntimeError.
    except Exception as error:
        raise UserError(
            f"--quantize_base: bitsandbytes cannot be imported ({first_line(error)}); mend its "
            "installation, or leave the flag out"
        ) from None


@torch.no_grad()
def round_linear_layers(module: nn.Module, bits: str, device: torch.device) -> None:
    """Give the linear layers of a plain model, in place, the values that `QuantizedLinear` would
    hold of them.

    Raises:
        UserError: bitsandbytes cannot be imported.
    """
    _check_package()
    for layer in module.modules():
        if type(layer) is nn.Linear:
            weight = layer.weight
            values, scales = _quantize(weight.to(device), bits)
            weight.copy_(_dequantize(values, scales, tuple(weight.shape), weight.dtype))


class QuantizedLinear(nn.Module):
    """A linear layer whose frozen weights, (outputs, inputs), are in 8 or 4 bits."""

    def __init__(
        self, linear: nn.Linear, bits: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.dtype = bits, dtype
        values, scales = _quantize(linear.weight.detach().to(device), bits)
        # Parameters, since DDP sends buffers to all processes before every pass.
        self.values = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(device, dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weights as they are multiplied with, in the run's dtype."""
        return self.weight_in(self.dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Bring the weights back from their bits, (outputs, inputs)."""
        return _dequantize(self.values, self.scales, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b, (..., outputs), in autocast's dtype as a plain linear layer."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = _Product.apply(x, self.values, self.scales, bias, self.out_features)
        return product


class _Product(torch.autograd.Function):
    """A linear layer's product that keeps no weights for the backward pass: they are brought back
    from their bits once more."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None, outputs: int
    ) -> Tensor:
        ctx.save_for_backward(values, scales)
        ctx.shape = outputs, x.shape[-1]
        weight = _dequantize(values, scales, ctx.shape, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        values, scales = ctx.saved_tensors
        weight = _dequantize(values, scales, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, None, None


def _quantize(weight: Tensor, bits: str) -> tuple[Tensor, Tensor]:
    """Give values and scales: int8 (outputs, inputs) and (outputs,), or two values of NF4 a byte
    and a scale a block."""
    from bitsandbytes import functional

    if bits == "8bit":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return values, scales
    values, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return values, state.absmax


def _dequantize(
    values: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    from bitsandbytes import functional

    if values.dtype == torch.int8:
        return functional.int8_vectorwise_dequant(values, scales).to(dtype)
    state = functional.QuantState(
        absmax=scales, shape=torch.Size(shape), dtype=dtype, blocksize=BLOCK, quant_type="nf4"
    )
    return functional.dequantize_4bit(values, state)

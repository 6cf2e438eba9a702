"""A UNet as a function of its parameters, and that function's derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdpo.models.forward import NoisedPairs, predict

Parameters = dict[str, Tensor]


def named(names: Sequence[str], tensors: Sequence[Tensor]) -> Parameters:
    """Tensors by the names of their parameters."""
    return dict(zip(names, tensors, strict=True))


def predict_at(unet: nn.Module, parameters: Parameters, inputs: NoisedPairs) -> Tensor:
    """As `predict`, with `parameters` in the place of the UNet's own."""
    return predict(lambda *args, **kwargs: functional_call(unet, parameters, args, kwargs), inputs)


def derivative(
    function: Callable[[Parameters], Tensor], at: Parameters, along: Parameters
) -> Tensor:
    """The directional derivative of `function`, by forward-mode differentiation."""
    # Of the attention kernels only the plain one has a forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return jvp(function, (at,), (along,))[1]

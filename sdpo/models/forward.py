"""From a batch of pairs to the UNet's inputs, and from those to predictions."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common import randomness
from sdpo.models.base import Conditioning
from sdpo.models.encoding import Encoder


@dataclass(frozen=True)
class NoisedPairs:
    """The UNet's inputs for B pairs, winners first; both branches share timestep and noise."""

    noisy: Tensor  # (2B, C, h, w)
    timesteps: Tensor  # (2B,)
    target: Tensor  # (2B, C, h, w), the noise
    conditioning: Conditioning  # of 2B samples

    def half(self, which: int) -> NoisedPairs:
        """The winners (0) or the losers (1) alone."""
        middle = len(self.noisy) // 2
        return self.samples(slice(0, middle) if which == 0 else slice(middle, None))

    def samples(self, keep: slice) -> NoisedPairs:
        """Some of the 2B samples, of one branch or of both."""
        return NoisedPairs(
            self.noisy[keep],
            self.timesteps[keep],
            self.target[keep],
            Conditioning(
                self.conditioning.hidden[keep],
                {k: v[keep] for k, v in self.conditioning.added.items()},
            ),
        )


@torch.no_grad()
def noise_pairs(
    encoder: Encoder,
    batch: Any,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    timesteps: Tensor | None = None,
) -> NoisedPairs:
    """Encode, noise and condition a batch; every draw is a function of the pairs' keys.

    Args:
        batch: B pairs as `encoder` takes them, with their keys.
        noise_offset: scale of an extra draw per sample and channel, part of noise and target.
        input_perturbation: scale of an extra draw per pixel, part of the input but not the target.
        timesteps: (B,) in place of drawn ones.
    """
    shape, device = encoder.latent_shape, encoder.device

    def draw(stream: str, size: tuple[int, ...] = shape) -> Tensor:
        return randomness.normal(size, batch.keys, stream).to(device)

    posterior_noise = torch.cat([draw("posterior-winner"), draw("posterior-loser")])
    latents = encoder.latents(batch, posterior_noise)
    noise = draw("noise")
    if noise_offset:
        noise = noise + noise_offset * draw("noise-offset", (shape[0], 1, 1))
    mixed_in = noise
    if input_perturbation:
        mixed_in = noise + input_perturbation * draw("input-perturbation")
    schedule = encoder.schedule
    if timesteps is None:
        timesteps = randomness.timesteps(schedule.config.num_train_timesteps, batch.keys)
    twice = timesteps.to(device).repeat(2)
    return NoisedPairs(
        noisy=schedule.add_noise(latents, mixed_in.repeat(2, 1, 1, 1), twice),
        timesteps=twice,
        target=noise.repeat(2, 1, 1, 1),
        conditioning=encoder.conditioning(batch).repeat(2),
    )


def predict(unet: nn.Module, inputs: NoisedPairs) -> Tensor:
    """The UNet's output, same shape as `inputs.noisy`."""
    kwargs = inputs.conditioning.unet_kwargs()
    return unet(inputs.noisy, inputs.timesteps, return_dict=False, **kwargs)[0]


def predict_winners_only(unet: nn.Module, inputs: NoisedPairs) -> Tensor:
    """As `predict`, the losers without gradient: for methods that do not train on them."""
    with torch.no_grad():
        losers = predict(unet, inputs.half(1))
    return torch.cat([predict(unet, inputs.half(0)), losers])


def make_reference(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy of `unet` that takes the memory of `dtype`.

    Only the weights of convolutions and linear layers are cast: autocast casts those anyway, so the
    copy's output under autocast is that of the float32 original, and a run starts at margin zero.
    """
    reference = copy.deepcopy(unet).requires_grad_(False).eval()
    hold_frozen_products(reference, dtype)
    return reference


def hold_frozen_products(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the convolutions and linear layers below `module` that are not trained, in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and not part.weight.requires_grad:
            part.to(dtype)


@torch.no_grad()
def predict_reference(
    reference: nn.Module, inputs: NoisedPairs, autocast: AbstractContextManager
) -> Tensor:
    """The frozen reference's output."""
    with autocast:
        return predict(reference, inputs)

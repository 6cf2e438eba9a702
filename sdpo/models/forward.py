"""From a batch of pairs to the model's inputs, and from those to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo.common import randomness
from sdpo.common.randomness import Key
from sdpo.models.base import Conditions, Family
from sdpo.models.encoding import Encoder


@dataclass(frozen=True)
class NoisedPairs:
    """The model's inputs for B pairs, winners first; both branches share time and noise."""

    noisy: Tensor  # x_t, (2B, C, h, w)
    timesteps: Tensor  # t, (2B,)
    target: Tensor  # (2B, C, h, w)
    conditions: Conditions  # of 2B samples

    def half(self, which: int) -> NoisedPairs:
        """Take the winners (0) or the losers (1) alone."""
        middle = len(self.noisy) // 2
        return self.samples(slice(0, middle) if which == 0 else slice(middle, None))

    def samples(self, keep: slice | list[int]) -> NoisedPairs:
        """Take some of the 2B samples, of one branch or of both."""
        conditions = {name: value[keep] for name, value in self.conditions.items()}
        return NoisedPairs(self.noisy[keep], self.timesteps[keep], self.target[keep], conditions)


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
    shape, device, process = encoder.latent_shape(batch), encoder.device, encoder.process

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
    if timesteps is None:
        timesteps = process.draw_times(batch.keys)
    twice = timesteps.to(device).repeat(2)
    return NoisedPairs(
        noisy=process.noised(latents, mixed_in.repeat(2, 1, 1, 1), twice),
        timesteps=twice,
        target=process.target(latents, noise.repeat(2, 1, 1, 1), twice),
        conditions=encoder.conditions(batch),
    )


def predict(family: Family, model: Any, inputs: NoisedPairs, drawn: Tensor | None = None) -> Tensor:
    """Call a model of the family on the pairs; its output, same shape as `inputs.noisy`. `drawn`,
    (B,) bool on the CPU: the losers that get a gradient, by default all."""
    if drawn is not None:
        return _predict_drawn(family, model, inputs, drawn)
    return family.predict(model, inputs.noisy, inputs.timesteps, inputs.conditions)


def _predict_drawn(family: Family, model: Any, inputs: NoisedPairs, drawn: Tensor) -> Tensor:
    # Always two calls: processes that divide the weights between them must make as many.
    pairs = len(drawn)
    with_gradient = [*range(pairs), *(pairs + drawn.nonzero()[:, 0]).tolist()]
    without = (pairs + (~drawn).nonzero()[:, 0]).tolist()
    with torch.no_grad():
        others = predict(family, model, inputs.samples(without or [0]))[: len(without)]
    # torch 2.6 keeps weights that autocast cast here, and would give them to the next pass: no
    # gradient would reach the weights themselves.
    torch.clear_autocast_cache()
    output = torch.cat([predict(family, model, inputs.samples(with_gradient)), others])
    return output[torch.tensor([*with_gradient, *without]).argsort().to(output.device)]


@torch.no_grad()
def predict_reference(
    family: Family, reference: Any, inputs: NoisedPairs, autocast: AbstractContextManager[None]
) -> Tensor:
    """Call the frozen reference on the pairs, without gradient."""
    with autocast:
        return predict(family, reference, inputs)


def no_losers(keys: Sequence[Key]) -> Tensor:
    """Draw none of B losers, (B,) bool."""
    return torch.zeros(len(keys), dtype=torch.bool)


def drawn_losers(keys: Sequence[Key], one_in: int) -> Tensor:
    """Draw the loser of one in `one_in` neighbouring pairs, (B,) bool, as a function of where the
    pairs stand: batch sizes and numbers of processes change nothing."""
    return torch.tensor(
        [
            randomness.integer(one_in, seed, epoch, place // one_in, "loser") == place % one_in
            for seed, epoch, place in keys
        ]
    )

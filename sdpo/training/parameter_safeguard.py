"""The safeguard's scale from the true gradients over the trained parameters.

The published rule (arXiv 2511.03317) takes the gradients at the UNet's output, which stands for the
parameters where the branches' Jacobians are alike and near-isometric. Here nothing is assumed: with
G_w and G_l the gradients over the parameters of the winners' and the losers' mean errors,

    lam = clamp((1 - mu) * |G_w|^2 / <G_w, G_l>, 0, 1)   where <G_w, G_l> > 0, else 1 ,

so that a small step along -(G_w - lam * G_l) lowers the winners' mean error by at least a share mu
of what the winners alone would give. Unlike at the output, samples of different micro-batches are
not orthogonal here: one scale for a step takes sums over all its micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdpo.common.randomness import Key
from sdpo.losses.safeguard import scale_from_products
from sdpo.losses.terms import as_accumulated, per_sample_mse
from sdpo.models.base import Family
from sdpo.models.forward import NoisedPairs, predict
from sdpo.models.lora import seed_dropout

# One tensor per parameter.
Gradients = Sequence[Tensor]


def inner_product(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Compute <a, b> over all parameters, (), on their device, in float32 or better."""
    products = [(as_accumulated(x) * as_accumulated(y)).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum()


def gradient_scale(winner: Gradients, loser: Gradients, mu: float) -> Tensor:
    """The loser's scale, (), from the gradients of both branches.

    Raises:
        ValueError: on mu outside [0, 1].
    """
    return scale_from_products(inner_product(winner, winner), inner_product(winner, loser), mu)


class BranchGradients:
    """Takes the two branches' gradients over the trained parameters of one UNet.

    Costs a forward and a backward pass of the UNet over the pairs, the branches (in scope "pair"
    the samples) one after another, and at most two more sets of gradients in memory than the one
    that a step has. With --lora_dropout both branches go through one forward pass, as they do in
    the loss, so that they meet the same masks as there; each backward pass (two, in scope "pair"
    two a pair) then runs through all of it.

    Raises:
        ValueError: on mu outside [0, 1], when a scale is asked for.
    """

    def __init__(
        self,
        family: Family,
        accelerator: Accelerator,
        unet: nn.Module,
        mu: float,
        dropout: bool = False,
    ) -> None:
        self.family, self.accelerator, self.mu = family, accelerator, mu
        # The module itself: nothing is accumulated in .grad, and no hook of DDP exchanges anything.
        self.unet = accelerator.unwrap_model(unet)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.together = dropout
        self._sums: tuple[list[Tensor], list[Tensor]] = [], []

    def add(self, inputs: NoisedPairs, keys: Sequence[Key]) -> None:
        """Take in one of a step's equally large micro-batches; `keys` are its B pairs'."""
        each = self._gradients(inputs, keys, parts=1)
        for total in self._sums:
            # Handed on, not held: the loser's gradient is taken when the winner's is gone.
            _take_in(total, next(each))

    def step_scale(self) -> Tensor:
        """One scale, (), for all that was added in all processes, which are then forgotten.

        Called by every process. Sums stand for means: their quotient is the same.
        """
        winner, loser = self._sums
        self._sums = [], []
        if self.accelerator.num_processes > 1:
            for total in (winner, loser):
                for i, gradient in enumerate(total):
                    total[i] = self.accelerator.reduce(gradient, "mean")
        return gradient_scale(winner, loser, self.mu)

    def pair_scales(self, inputs: NoisedPairs, keys: Sequence[Key]) -> Tensor:
        """One scale per pair, (B,), from that pair's own gradients."""
        each = self._gradients(inputs, keys, parts=len(keys))
        return torch.stack([gradient_scale(next(each), next(each), self.mu) for _ in keys])

    def _gradients(
        self, inputs: NoisedPairs, keys: Sequence[Key], parts: int
    ) -> Iterator[Gradients]:
        """G_w and G_l of each of `parts` equal parts of the pairs, by turns."""
        return map(self._gradient, self._errors(inputs, keys, parts))

    def _errors(self, inputs: NoisedPairs, keys: Sequence[Key], parts: int) -> Iterator[Tensor]:
        """Mean errors, (), of the parts' winners and losers by turns."""
        pairs = len(inputs.noisy) // 2
        size = pairs // parts
        if self.together:
            seed_dropout(keys)
            errors = self._sample_errors(inputs)
        for first in range(0, pairs, size):
            for begin in (first, pairs + first):
                keep = slice(begin, begin + size)
                own = errors[keep] if self.together else self._sample_errors(inputs.samples(keep))
                yield own.mean()

    def _sample_errors(self, inputs: NoisedPairs) -> Tensor:
        with self.accelerator.autocast():
            prediction = predict(self.family, self.unet, inputs)
        return per_sample_mse(as_accumulated(prediction) - inputs.target)

    def _gradient(self, error: Tensor) -> Gradients:
        if self.accelerator.scaler is not None:
            # Against underflow in fp16; it cancels in the quotient.
            error = self.accelerator.scaler.scale(error)
        return torch.autograd.grad(
            error,
            self.parameters,
            retain_graph=self.together,
            allow_unused=True,
            materialize_grads=True,
        )


def _take_in(total: list[Tensor], more: Gradients) -> None:
    if not total:
        total.extend(more)
        return
    # Not in place: autograd may give one tensor for two parameters. One by one, so that there are
    # never two whole sets of sums.
    for i, gradient in enumerate(more):
        total[i] = total[i] + gradient

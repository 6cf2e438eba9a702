"""Running a scorer in mixed precision, as long as float32 says the same."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo.common.precision import DTYPES
from sdpo.evaluation.score.base import BaseScorer

# Share of the scores' own spread that mixed precision may change them by.
TOLERANCE = 0.02


class CheckedPrecision:
    """Scores batches under autocast; the first batch is scored in float32 too, and where that makes
    a difference all go on in float32.

    `precision` is "no" or what is used; `difference` the largest one found, None where not looked.
    """

    def __init__(self, name: str, scorer: BaseScorer, wanted: str, device: torch.device) -> None:
        if wanted == "auto":
            wanted = "fp16" if device.type == "cuda" else "no"
        self.name, self.scorer, self.precision, self.device = name, scorer, wanted, device
        self.difference: float | None = None

    @torch.no_grad()
    def __call__(self, views: Tensor, prompts: list[str]) -> Tensor:
        """Score views (B, 3, H, W), on any device, with B prompts: (B,), float64 on the CPU."""
        views = views.to(self.device)
        if self.precision == "no":
            return self._exact(views, prompts)
        with torch.autocast(self.device.type, dtype=DTYPES[self.precision]):
            mixed = self.scorer.score(views, prompts).cpu().double()
        if self.difference is not None:
            return mixed
        exact = self._exact(views, prompts)
        self.difference = (mixed - exact).abs().max().item()
        spread = exact.std().item() if len(exact) > 1 else 0.0
        # `not <=` so that a NaN counts as too large.
        if not self.difference <= TOLERANCE * spread:
            print(
                f"{self.name}: {self.precision} changes scores by {self.difference:.2g} (they vary "
                f"by {spread:.2g}): going on in float32"
            )
            self.precision = "no"
            return exact
        return mixed

    def _exact(self, views: Tensor, prompts: list[str]) -> Tensor:
        return self.scorer.score(views, prompts).cpu().double()

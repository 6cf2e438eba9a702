"""How much of the loser's gradient is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdpo.common.flags import SHARE, at_least, flag


@dataclass(frozen=True)
class SafeguardConfig:
    """The winner-preserving rule, or a constant in its place."""

    use_winner_preserving: bool = flag(
        False, "scale the loser's gradient so that a step does not raise the winner's loss"
    )
    winner_preserving_mu: float = flag(
        0.9,
        "share of the winner's own decrease that must remain, 0 to 1",
        metavar="MU",
        check=SHARE,
    )
    winner_preserving_scope: Literal["batch", "pair"] | None = flag(
        None,
        "one scale per micro-batch (batch, as published) or per pair",
        choices=("batch", "pair"),
        shown="batch where the base predicts noise, else pair",
    )
    winner_preserving_space: Literal["output", "parameter"] = flag(
        "output",
        "take the scale from gradients at the UNet's output (as published) or over the trained "
        "parameters, which costs one more forward and backward pass; scope batch is then one scale "
        "for the whole step",
        choices=("output", "parameter"),
    )
    loser_scale_fixed: float | None = flag(
        None,
        "multiply the loser's gradient by a constant, 0 to 1, in place of the safeguard",
        metavar="C",
        check=SHARE,
    )

    losers_one_in: int = flag(
        1,
        "of every N pairs train on the loser of one, drawn by chance, N times as much; the others' "
        "losers go forward alone; N must divide --train_batch_size (an experiment: docs/LAB.md)",
        metavar="N",
        check=at_least(1),
    )

    @property
    def scope(self) -> Literal["batch", "pair"]:
        """The scope; as published where nothing was said and no base was asked."""
        return self.winner_preserving_scope or "batch"

    @property
    def over_parameters(self) -> bool:
        """Whether the scale is taken from gradients over the parameters."""
        return self.use_winner_preserving and self.winner_preserving_space == "parameter"

    @property
    def output_mu(self) -> float | None:
        """mu where the scale is taken at the model's output, else None."""
        at_output = self.use_winner_preserving and not self.over_parameters
        return self.winner_preserving_mu if at_output else None

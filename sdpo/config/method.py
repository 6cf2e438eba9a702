"""The preference loss, its options, and the noise it is taken at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdpo.common.flags import ABOVE_ZERO, NOT_NEGATIVE, SHARE, flag
from sdpo.losses import FORMS, method_names


@dataclass(frozen=True)
class MethodConfig:
    """One of the files of `sdpo/losses/` and what it takes."""

    train_method: str = flag("diffusion-dpo", "the loss", choices=method_names())
    beta_dpo: float = flag(
        5000.0, "strength of the implicit KL constraint", metavar="BETA", check=ABOVE_ZERO
    )
    dmpo_alpha: float = flag(
        0.01, "DMPO only: smoothing of the target distribution", metavar="ALPHA", check=SHARE
    )
    dspo_form: str | None = flag(
        None,
        "DSPO only: which of its two losses",
        choices=FORMS,
        shown="the base model's family's",
    )
    noise_offset: float = flag(
        0.0, "scale of a per-channel offset of the noise", check=NOT_NEGATIVE
    )
    input_perturbation: float = flag(
        0.0,
        "scale of extra noise at the UNet's input that the target does not contain",
        check=NOT_NEGATIVE,
    )

    def options(self, family: str) -> dict[str, Any]:
        """Give the chosen method its own options; DSPO's form is the family's where none is
        named."""
        own: dict[str, dict[str, Any]] = {
            "dmpo": {"alpha": self.dmpo_alpha},
            "dspo": {"form": self.dspo_form or family},
        }
        return own.get(self.train_method, {})

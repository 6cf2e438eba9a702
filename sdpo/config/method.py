"""The preference loss, its options, and the noise it is taken at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdpo.common.flags import ABOVE_ZERO, FINITE, NOT_NEGATIVE, SHARE, flag
from sdpo.losses import FORMS, method_names

TIME_SAMPLINGS = ("logit-normal", "uniform")


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
    time_sampling: str | None = flag(
        None,
        "rectified flow only: how times are drawn",
        choices=TIME_SAMPLINGS,
        shown="logit-normal",
    )
    time_mean: float | None = flag(
        None,
        "of the normal number whose sigmoid is a logit-normal time; above 0: more noise",
        metavar="M",
        check=FINITE,
        shown="0",
    )
    time_std: float | None = flag(
        None, "its standard deviation", metavar="S", check=ABOVE_ZERO, shown="1"
    )
    time_shift: float | None = flag(
        None,
        "A in sigma <- A sigma / (1 + (A - 1) sigma), which follows; 1: none",
        metavar="A",
        check=ABOVE_ZERO,
        shown="the base's own",
    )

    def options(self, family: str) -> dict[str, Any]:
        """Give the chosen method its own options; DSPO's form is that of SDXL for SDXL,
        else that of SD1.5, where none is named."""
        own: dict[str, dict[str, Any]] = {
            "dmpo": {"alpha": self.dmpo_alpha},
            "dspo": {"form": self.dspo_form or ("sdxl" if family == "sdxl" else "sd15")},
        }
        return own.get(self.train_method, {})

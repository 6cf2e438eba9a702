"""Diffusion-SDPO: preference losses for diffusion models with a winner-preserving safeguard.

The plug-in core needs nothing but torch and can be called from any trainer:

    from sdpo import loser_scale, preference_loss
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdpo.losses.preference import LossOutput, preference_loss
    from sdpo.losses.safeguard import loser_scale, scale_from_products, scale_gradient

__all__ = [
    "LossOutput",
    "loser_scale",
    "preference_loss",
    "scale_from_products",
    "scale_gradient",
]
__version__ = "0.1.0"

_HOME = {
    "LossOutput": "sdpo.losses.preference",
    "preference_loss": "sdpo.losses.preference",
    "loser_scale": "sdpo.losses.safeguard",
    "scale_from_products": "sdpo.losses.safeguard",
    "scale_gradient": "sdpo.losses.safeguard",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that argument parsing can import `sdpo.args` without torch.
    if name not in _HOME:
        raise AttributeError(f"module 'sdpo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)

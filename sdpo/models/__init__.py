"""Base models: a file for each family, and what all of them share. Adding a family is adding its
file, its line in `_CLASSES` and its entry in `sdpo/config/families.py`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sdpo.config import TrainConfig
    from sdpo.models.base import Family, ModelSource
    from sdpo.models.noise import Times

# By the name in `sdpo.config.families.FAMILIES`: module in this package, class.
_CLASSES = {
    "sd15": ("sd15", "SD15"),
    "sdxl": ("sdxl", "SDXL"),
    "sd3": ("sd3", "SD3"),
    "flux": ("flux", "Flux"),
    "qwen-image": ("qwen_image", "QwenImage"),
    "z-image": ("z_image", "ZImage"),
    "pixart-sigma": ("pixart_sigma", "PixArtSigma"),
    "sana": ("sana", "Sana"),
    "lumina-2": ("lumina2", "Lumina2"),
    "flux2-klein": ("flux2_klein", "Flux2Klein"),
}


class Base(NamedTuple):
    """A base pipeline: what kind it is, and where its parts lie."""

    family: Family
    source: ModelSource


def get_family(name: str, times: Times | None = None) -> Family:
    """Give the family of a name, by which a rectified flow's `times` are drawn."""
    module, cls = _CLASSES[name]
    family: Family = getattr(import_module(f"sdpo.models.{module}"), cls)(times)
    return family


def open_base(config: TrainConfig) -> Base:
    """Open the base that a run's settings name; no weights are read.

    Raises:
        UserError: its configuration files are not to be had, or of another kind of model.
    """
    from sdpo.models.base import ModelSource
    from sdpo.models.kind import kind_of_base
    from sdpo.models.noise import Times

    method, kind = config.method, kind_of_base(config.model, config.data.cache_dir)
    times = {
        "sampling": method.time_sampling,
        "mean": method.time_mean,
        "std": method.time_std,
        "shift": method.time_shift,
    }
    given: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
    base = Base(get_family(kind.family, Times(**given)), ModelSource.of(config))
    base.family.check(base.source)
    return base

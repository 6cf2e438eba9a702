"""Base models: a file for each family, and what all of them share. Adding a family is adding its
file and its line in `get_family` and `sdpo/config/families.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sdpo.config import TrainConfig
    from sdpo.models.base import Family, ModelSource


class Base(NamedTuple):
    """A base pipeline: what kind it is, and where its parts lie."""

    family: Family
    source: ModelSource


def get_family(sdxl: bool) -> Family:
    """Give the family that train.py's --sdxl selects."""
    if sdxl:
        from sdpo.models.sdxl import SDXL

        return SDXL()
    from sdpo.models.sd15 import SD15

    return SD15()


def open_base(config: TrainConfig) -> Base:
    """Open the base that a run's settings name; no weights are read.

    Raises:
        UserError: its configuration files are not to be had, or of another kind of model.
    """
    from sdpo.models.base import ModelSource

    base = Base(get_family(config.model.sdxl), ModelSource.of(config))
    base.family.check(base.source)
    return base

"""Model families: `get_family(sdxl)` is the object that knows all that differs between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpo.models.base import Family


def get_family(sdxl: bool) -> Family:
    """The family that train.py's --sdxl selects."""
    if sdxl:
        from sdpo.models.sdxl import SDXL

        return SDXL()
    from sdpo.models.sd15 import SD15

    return SD15()

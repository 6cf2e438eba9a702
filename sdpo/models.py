"""The models of one run, together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sdpo.families.base import Family, Frozen, ModelSource


@dataclass
class Models:
    """What a run trains and what it trains against."""

    family: Family
    source: ModelSource
    unet: nn.Module  # as `Accelerator.prepare` gave it
    reference: nn.Module
    frozen: Frozen

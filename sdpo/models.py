"""The models of one run, together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sdpo.ema import Ema
from sdpo.encoding import Encoder
from sdpo.families.base import Family, ModelSource
from sdpo.reference import Reference


@dataclass
class Models:
    """What a run trains and what it trains against."""

    family: Family
    source: ModelSource
    unet: nn.Module  # as `Accelerator.prepare` gave it
    reference: Reference
    encoder: Encoder
    ema: Ema | None = None
    skeleton: nn.Module | None = None  # what `sharding.shard` gave, where the UNet is sharded

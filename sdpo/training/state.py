"""The models of one run, together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sdpo.models.base import Family, ModelSource
from sdpo.models.ema import Ema
from sdpo.models.encoding import Encoder
from sdpo.models.reference import Reference


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

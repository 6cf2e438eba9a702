"""What a run consists of while it goes on, known to all of its parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sdpo.models.encoding import Encoder
from sdpo.models.reference import Reference
from sdpo.training.sharding import whole

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from torch import nn

    from sdpo.common.signals import StopRequest
    from sdpo.config import TrainConfig
    from sdpo.data.loader import PairLoader
    from sdpo.data.order import Place
    from sdpo.models import Base
    from sdpo.models.ema import Ema
    from sdpo.training.parameter_safeguard import BranchGradients
    from sdpo.training.reference_cache.errors import CachedErrors
    from sdpo.training.sharding import Sharding


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and the next place in its data."""

    step: int
    place: Place


@dataclass
class Models:
    """What a run trains and what it trains against."""

    base: Base
    unet: Any  # trained; as `Accelerator.prepare` gave it
    reference: Reference | None  # None where `cached_errors` has all that is asked of it
    encoder: Encoder
    ema: Ema | None = None
    cached_errors: CachedErrors | None = None  # of the reference, with --cache_reference
    skeleton: nn.Module | None = None  # what `sharding.shard` gave, where the UNet is sharded
    parameters: int = 0  # numbers in the plain UNet
    reference_digest: str = ""  # by `sdpo.models.reference.weights_digest`
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by its `settings_of`

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.unet.parameters() if p.requires_grad]


def gathered(models: Models, accelerator: Accelerator) -> Models | None:
    """Give the models of a run with their UNet unwrapped and, where it is sharded, copies of UNet
    and average that are whole and on the CPU. Called by every process; None on all but the main
    one."""
    main = accelerator.is_main_process
    unet, ema = accelerator.unwrap_model(models.unet), models.ema
    if models.skeleton is not None:
        state = whole(unet.state_dict(), keep=main)
        averages: Any = whole(ema.averages, keep=main) if ema else None
        if main:
            unet = copy.deepcopy(models.skeleton)
            unet.load_state_dict(state, assign=True)
            ema = ema.of(unet, averages) if ema else None
    return replace(models, unet=unet, ema=ema) if main else None


class Session:
    """What the parts of a run share; `sdpo.training.run.Run` sets and moves it."""

    config: TrainConfig
    accelerator: Accelerator
    device: torch.device
    output_dir: Path
    sharding: Sharding | None
    resume_from: Path | None
    progress: Progress
    stop: StopRequest
    models: Models
    loader: PairLoader
    gradients: BranchGradients | None = None  # where the safeguard goes over the parameters
    data_error: str | None = None  # what ended this process's batches
    one_scale_a_step = False  # else a scale is taken within each micro-batch

    @property
    def training(self) -> dict[str, Any]:
        """The state dicts of the checkpoint to go on from."""
        raise NotImplementedError

"""A training run's settings: frozen dataclasses by section, made from the command line, from a
configuration file or from a run's config.json. No torch, and no file of models or data is looked at
(sdpo/training/places.py does that)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sdpo.common.flags import flat, from_flat, given_flags
from sdpo.config.data import DataConfig, SourceConfig
from sdpo.config.hub import HubConfig
from sdpo.config.method import MethodConfig
from sdpo.config.model import ModelConfig
from sdpo.config.optim import OptimConfig
from sdpo.config.rules import check_rules, fill_in
from sdpo.config.run import RunConfig
from sdpo.config.safeguard import SafeguardConfig

C = TypeVar("C", bound="TrainConfig")
ABOUT = (
    "Align a text-to-image model with preference pairs, with or without the winner-preserving "
    "safeguard."
)


@dataclass(frozen=True)
class TrainConfig:
    """All of train.py's flags, whose names are those of the public Diffusion-DPO code."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    safeguard: SafeguardConfig = field(default_factory=SafeguardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def from_flags(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build a run's settings from flag names and values: a parsed command line, or the "args"
        of a config.json. What is missing takes its default.

        Raises:
            UserError: naming the flag and what would be right.
        """
        config = from_flat(cls, fill_in(dict(values)))
        check_rules(config.model, config.data, config.method, config.safeguard, config.optim)
        return config

    def flags(self) -> dict[str, Any]:
        """All values by flag, as config.json and checkpoints keep them."""
        return flat(self)


def parse_train(
    argv: Sequence[str], program: str = "train.py", about: str | None = ABOUT
) -> TrainConfig:
    """Parse train.py's command line and check all that needs no file.

    Raises:
        UserError: naming the flag and what would be right.
    """
    return TrainConfig.from_flags(given_flags(TrainConfig, argv, program, about))


__all__ = [
    "DataConfig",
    "HubConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SafeguardConfig",
    "SourceConfig",
    "TrainConfig",
    "parse_train",
]

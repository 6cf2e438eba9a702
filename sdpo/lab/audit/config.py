"""The audit's flags: train.py's and its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdpo.common.errors import UserError
from sdpo.common.flags import SHARE, at_least, flag, given_flags
from sdpo.config import TrainConfig
from sdpo.models.locations import WEIGHT_SUFFIXES
from sdpo.training.checkpoint_paths import is_complete
from sdpo.training.places import check_places

PROGRAM = "python -m sdpo.lab audit"
# What the audit does not reproduce; each would need a way of its own.
NOT_SERVED = (
    "lora_rank",
    "use_adafactor",
    "use_8bit_adam",
    "cache_dir_latents",
    "cache_reference",
    "choice_model",
    "loser_scale_fixed",
)


@dataclass(frozen=True)
class AuditFlags:
    """Which weights are looked at, and how closely."""

    checkpoint: str | None = flag(
        None,
        "the weights to audit: a run's checkpoint-N/, which brings AdamW's moments and its place "
        "in the data along, or unet.pth / .safetensors",
        metavar="PATH",
        shown="the base's own",
    )
    steps: int = flag(32, "batches to look at", metavar="N", check=at_least(1))
    fixed_scales: tuple[float, ...] = flag(
        (0.0, 0.25, 0.5, 0.75),
        "fixed scales to compare with",
        metavar="C",
        check=SHARE,
        shown="0 0.25 0.5 0.75",
        empty=True,
    )
    moment_batches: int = flag(
        8,
        "where the checkpoint holds no moments: batches to make them from, as if N steps had been "
        "taken without moving",
        metavar="N",
        check=at_least(1),
    )
    jacobian_pairs: int = flag(
        64,
        "pairs whose gradients over the parameters are compared with their residuals",
        metavar="N",
        check=at_least(1),
    )
    spectrum_pairs: int = flag(
        4,
        "pairs whose Jacobians' spectrum is estimated, 0 for none",
        metavar="N",
        check=at_least(0),
    )
    probes: int = flag(4, "random vectors each", metavar="N", check=at_least(1))
    lanczos: int = flag(24, "Lanczos iterations", metavar="N", check=at_least(1))


@dataclass(frozen=True)
class AuditConfig(TrainConfig):
    """All of train.py's flags and the audit's own."""

    audit: AuditFlags = field(default_factory=AuditFlags)


def parse_config(argv: Sequence[str], about: str | None = None) -> AuditConfig:
    """Parse the audit's command line and check it, places too.

    Raises:
        UserError: naming the flag and what would be right.
    """
    own = {"output_dir": "output/audit", "report_to": "none"}
    config = AuditConfig.from_flags(own | given_flags(AuditConfig, argv, PROGRAM, about))
    config = check_places(config)
    flags = config.flags()
    for name in NOT_SERVED:
        # 0.0 is a value that a flag can have been given.
        if flags[name] not in (None, False):
            raise UserError(f"--{name}: the audit does not serve it; leave it out")
    if config.safeguard.losers_one_in > 1:
        raise UserError("--losers_one_in: the audit looks at all losers; leave it out")
    if config.safeguard.winner_preserving_space == "parameter" and (
        config.safeguard.scope == "pair"
    ):
        raise UserError("--winner_preserving_scope pair: the audit serves it at the output alone")
    if config.method.train_method == "sft":
        raise UserError("--train_method sft has no losers to audit")
    if config.audit.checkpoint is not None:
        _check_checkpoint(Path(config.audit.checkpoint))
    return config


def _check_checkpoint(path: Path) -> None:
    if path.is_dir():
        if not is_complete(path):
            raise UserError(f"--checkpoint: {path} is not a complete checkpoint-N directory")
    elif not path.is_file() or path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"--checkpoint: {path} is neither a checkpoint-N directory nor a file of weights "
            f"({', '.join(sorted(WEIGHT_SUFFIXES))})"
        )

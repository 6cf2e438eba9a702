"""Where a run writes, what it goes on from, and what it shows on the way."""

from __future__ import annotations

from dataclasses import dataclass

from sdpo.common.flags import NOT_NEGATIVE, at_least, flag
from sdpo.config.hub import HubConfig

TRACKERS = ("tensorboard", "wandb", "comet_ml", "mlflow", "all", "none")


@dataclass(frozen=True)
class OutputConfig:
    """Output, seed, checkpoints, sample grids and logs."""

    output_dir: str = flag("output/train", "where the run is written", metavar="DIR", expand=True)
    seed: int = flag(0, "of every random choice", check=NOT_NEGATIVE)
    checkpointing_steps: int = flag(
        500, "save a checkpoint every N steps", metavar="N", check=at_least(1)
    )
    checkpoints_total_limit: int | None = flag(
        None, "keep only the newest N", metavar="N", check=at_least(1)
    )
    resume_from_checkpoint: str = flag(
        "latest",
        "latest: go on from the newest complete checkpoint of --output_dir if there is one; none: "
        "refuse to; or a checkpoint directory",
        metavar="latest|none|DIR",
        expand=True,
    )
    validation_prompts: tuple[str, ...] = flag(
        (),
        "prompts of the sample grid, or one .txt file with a prompt a line",
        metavar="PROMPT",
        lines=True,
    )
    validation_steps: int = flag(500, "draw the grid every N steps", metavar="N", check=at_least(1))
    report_to: str = flag("tensorboard", "tracker", choices=TRACKERS)
    logging_dir: str = flag("logs", "the trackers' folder under --output_dir")
    tracker_project_name: str = flag("sdpo", "the trackers' project")
    check_only: bool = flag(
        False, "check flags and paths, no more: nothing is loaded or written", record=False
    )


@dataclass(frozen=True)
class RunConfig(HubConfig, OutputConfig):
    """Output, and whether it is uploaded at the end."""

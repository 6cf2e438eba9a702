"""The processes of a training run: their number, device, precision, trackers and logging."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from sdpo.common.errors import UserError
from sdpo.common.precision import check_precision
from sdpo.common.processes import WAIT_LIMIT, join, quieten_libraries

if TYPE_CHECKING:
    from sdpo.config import TrainConfig


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Join the launcher's other processes, or run alone; only the main process logs.

    Raises:
        UserError: the device cannot do --mixed_precision, a tracker is not installed; see `join`.
    """
    output_dir, report_to = Path(config.run.output_dir), config.run.report_to
    logs = str(output_dir / config.run.logging_dir)
    project = ProjectConfiguration(project_dir=str(output_dir), logging_dir=logs)
    try:
        accelerator = join(
            lambda: Accelerator(
                mixed_precision=config.optim.mixed_precision,
                log_with=None if report_to == "none" else report_to,
                project_config=project,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT_LIMIT)],
            )
        )
    except ValueError as error:
        flag = "mixed_precision" if "precision" in str(error) else "report_to"
        raise UserError(f"--{flag} {config.flags()[flag]}: {error}") from None
    check_precision("--mixed_precision", config.optim.mixed_precision, accelerator.device)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    quieten_libraries()
    return accelerator

"""The process's device and its place among the others."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

# Processes may have to wait while one downloads and converts a large dataset, or finishes its
# share; the usual ten minutes would end them there.
WAIT_LIMIT = timedelta(hours=12)


def start() -> Accelerator:
    """The accelerator: the launcher's processes, or this one alone on the best device there is."""
    import logging

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from sdpo.training.runlog import quieten_libraries

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    quieten_libraries()
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT_LIMIT)])


def device_of(name: str | None, accelerator: Accelerator) -> torch.device:
    """The device that --device names, else the process's own.

    Raises:
        UserError: this machine has none of that name.
    """
    import torch

    if name is None:
        own: torch.device = accelerator.device
        return own
    try:
        return torch.zeros(1, device=name).device
    # Each backend has its own errors for a device that is not there.
    except Exception as error:
        raise UserError(f"--device {name}: {first_line(error)}") from None

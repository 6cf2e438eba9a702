"""The processes of a run: starting them, their devices, and a console left to the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from sdpo.common.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")

# Processes may have to wait while one downloads and converts a large dataset, or finishes its
# share; the usual ten minutes would end them there.
WAIT_LIMIT = timedelta(hours=12)


# What accelerate may read from its variables: which devices there are, and how much is logged.
_KEPT = ("USE_CPU", "USE_XPU", "USE_MPS_DEVICE", "TORCH_DEVICE", "CPU_AFFINITY", "LOG_LEVEL")


def ignore_accelerates_settings() -> None:
    """Take accelerate's variables out of the environment, all but those on devices and logging.

    They come from the shell or from accelerate's own configuration file and win over what the
    program says: gradient accumulation would be counted twice, compiled models saved under other
    names. The program's flags alone decide how it computes.
    """
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        if name.removeprefix("ACCELERATE_") not in _KEPT:
            del os.environ[name]


# By which a launcher (torch's, MPI's) tells a process of the others.
_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)


def leave_launcher() -> None:
    """Take a launcher's variables out of the environment, so that `start` runs alone."""
    for name in _LAUNCHERS:
        os.environ.pop(name, None)


def start() -> Accelerator:
    """Join the launcher's other processes, or run alone on the best device there is.

    Raises:
        UserError: see `join`.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    quieten_libraries()
    handlers = [InitProcessGroupKwargs(timeout=WAIT_LIMIT)]
    return join(lambda: Accelerator(mixed_precision="no", kwargs_handlers=handlers))


def join(make: Callable[[], Accelerator]) -> Accelerator:
    """Call `make` so that the accelerator joins all processes that the launcher started; where the
    machine has no accelerator, on its CPUs, which accelerate itself does only when told.

    Raises:
        UserError: it would run alone, or one of accelerate's variables is wrong.
    """
    import torch

    ignore_accelerates_settings()
    size = os.environ.get("WORLD_SIZE", "1")
    several = size.isdigit() and int(size) > 1
    if several and "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with naming_variables():
        accelerator = make()
    if several and accelerator.num_processes != int(size):
        raise UserError(
            f"WORLD_SIZE={size} in the environment, but each process would run alone, on "
            f"{accelerator.device}: start them by `accelerate launch --multi_gpu --num_processes "
            f"{size}` or torchrun, on CPUs with ACCELERATE_USE_CPU=true; or start one process "
            "without WORLD_SIZE"
        )
    return accelerator


@contextmanager
def naming_variables() -> Iterator[None]:
    """Blame an error of the block on accelerate's variables on devices, where they are wrong.

    Raises:
        UserError: naming the variable.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        said = first_line(error)
        for name, words in (("USE_CPU", "invalid truth value"), ("TORCH_DEVICE", "device")):
            value = os.environ.get(f"ACCELERATE_{name}")
            if value is not None and words in said and value.lower() in said:
                raise UserError(f"ACCELERATE_{name}={value} in the environment: {said}") from None
        raise


class SharedError(UserError):
    """A `UserError` of one process that every process raises at the same place, so that they can
    still work together."""


def together(work: Callable[[], T]) -> T:
    """Call `work` on every process and give each its own result.

    Raises:
        SharedError: in all, the first `UserError` of any of them, so that none waits for one that
            is gone.
    """
    error = None
    try:
        value = work()
    except UserError as raised:
        error = str(raised)
    raise_first(error)
    return value


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call `work` on the main process and give its value to all.

    Raises:
        SharedError: in all, its `UserError`.
    """
    from accelerate.utils import broadcast_object_list

    value = together(lambda: work() if accelerator.is_main_process else None)
    found: T = broadcast_object_list([value])[0]
    return found


def raise_first(error: str | None) -> None:
    """Compare notes with the other processes, each of which calls this with its own error or None.

    Raises:
        SharedError: in all, the first that any has.
    """
    from accelerate.utils import gather_object

    for found in gather_object([error]):
        if found is not None:
            raise SharedError(found)


def device_of(name: str | None, accelerator: Accelerator) -> torch.device:
    """Find the device that --device names, else the process's own.

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


def quieten_libraries() -> None:
    """Leave the console to the run: libraries report errors only and draw no bars, but for the one
    that shows a dataset being built."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        logs: Any = library.utils.logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    # The hub's client announces every retry, twice where the root logger has a handler; what it
    # gives up on is raised as an error. bitsandbytes misses kernels for CPUs that nothing here
    # calls.
    for chatty in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for chatty in ("httpx", "httpx2", "datasets", "accelerate", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

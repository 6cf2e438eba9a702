"""Which of the machine's devices a run of a sweep is given."""

from __future__ import annotations

import os

VISIBLE = "CUDA_VISIBLE_DEVICES"


def own_devices() -> list[dict[str, str]]:
    """List the accelerators that this process may use, each by the variables that leave a program
    that one alone; none on a machine without."""
    import torch

    if not torch.accelerator.is_available():
        return []
    count = torch.accelerator.device_count()
    if count == 1:
        return [{}]
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return [{VISIBLE: name} for name in named[:count] or map(str, range(count))]

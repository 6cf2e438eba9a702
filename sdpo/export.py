"""The trained model as a whole diffusers pipeline, for anyone's `from_pretrained`."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from sdpo.families.base import Family, ModelSource
from sdpo.files import rename_complete


def export_pipeline(path: Path, family: Family, source: ModelSource, unet: nn.Module) -> Path:
    """Write `unet` and the base's other parts, float32 safetensors, in diffusers layout.

    The other parts are loaded afresh, since the run may hold them in half precision.
    """
    pipeline = family.pipeline(unet.to("cpu"), family.load_frozen(source), source)
    beside, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(beside, safe_serialization=True)
    if path.exists():
        path.rename(old)
    rename_complete(beside, path)
    shutil.rmtree(old, ignore_errors=True)
    return path

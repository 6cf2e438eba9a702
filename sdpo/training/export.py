"""The trained model as a whole diffusers pipeline, for anyone's `from_pretrained`."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from sdpo.common.files import replace_directory
from sdpo.models.base import Family, ModelSource


def export_pipeline(path: Path, family: Family, source: ModelSource, unet: nn.Module) -> Path:
    """Write `unet` and the base's other parts, float32 safetensors, in diffusers layout.

    The other parts are loaded afresh, since the run may hold them in half precision.
    """
    pipeline = family.pipeline(unet.to("cpu"), family.load_frozen(source), source)
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside, safe_serialization=True)
    replace_directory(beside, path)
    return path

"""What a checkpoint, and the end of a run, hold of the trained weights.

checkpoint-N/ holds      always                       with --lora_rank
                         unet.pth                     pytorch_lora_weights.safetensors
with --use_ema also      unet_ema.pth                 pytorch_lora_weights_ema.safetensors

The first column is plain state dicts of a UNet, adapters computed in. A run ends with pipeline/,
with --use_ema pipeline_ema/, and beside them the files of the second column.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdpo.common.files import written_beside
from sdpo.models.ema import Ema
from sdpo.models.lora import LORA_FILE, has_adapters, load_adapters, merged_state, save_adapters
from sdpo.training.checkpoint import Progress, load_unet, save_checkpoint
from sdpo.training.checkpoint_paths import EMA_FILE
from sdpo.training.export import export_pipeline
from sdpo.training.state import Models

_EMA = "_ema"
EMA_LORA_FILE = f"{Path(LORA_FILE).stem}{_EMA}.safetensors"


def save_run(
    args: argparse.Namespace, progress: Progress, models: Models, training: dict[str, Any]
) -> Path:
    """Write `checkpoint-N/`, by one process alone; see the head of this file.

    Args:
        models: with the UNet unwrapped and whole, as `sdpo.training.sharding.gathered` gives them.
        training: state dicts of optimizer and the like.
    """
    unet = models.unet

    def write_more(directory: Path) -> None:
        if has_adapters(unet):
            save_adapters(unet, directory / LORA_FILE)
        if models.ema is None:
            return
        with models.ema.applied():
            torch.save(_on_cpu(plain_state(models)), directory / EMA_FILE)
            if has_adapters(unet):
                save_adapters(unet, directory / EMA_LORA_FILE)

    if models.ema is not None:
        training = {**training, "ema": {"steps": models.ema.steps}}
    return save_checkpoint(
        Path(args.output_dir),
        progress,
        lambda: plain_state(models),
        training,
        args,
        args.checkpoints_total_limit,
        write_more,
    )


def plain_state(models: Models) -> dict[str, Tensor]:
    """The state dict of a plain UNet that computes what that of `models` does.

    Adapters are computed into the weights that the run started from, read again in float32 where
    the run holds them in half precision.
    """
    unet = models.unet
    if not has_adapters(unet):
        return unet.state_dict()
    if all(p.dtype == torch.float32 for p in unet.parameters()):
        return merged_state(unet)
    return merged_state(unet, models.family.load_unet(models.source).state_dict())


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def load_weights(checkpoint: Path, unet: nn.Module) -> None:
    """Load what is trained, in place, to the bit as it was saved.

    Raises:
        UserError: a file of the checkpoint is unreadable or does not fit.
    """
    if has_adapters(unet):
        load_adapters(unet, checkpoint / LORA_FILE)
    else:
        load_unet(checkpoint, unet)


def load_ema(checkpoint: Path, training: dict[str, Any], unet: nn.Module, ema: Ema) -> None:
    """Load the average and its count of steps.

    Raises:
        UserError: a file of the checkpoint is unreadable or does not fit.
    """
    with ema.applied():
        if has_adapters(unet):
            load_adapters(unet, checkpoint / EMA_LORA_FILE)
        else:
            load_unet(checkpoint, unet, EMA_FILE)
    ema.steps = training["ema"]["steps"]


def export_run(output_dir: Path, models: Models) -> list[Path]:
    """Write what a finished run leaves at the top of `output_dir`; the UNet ends on the CPU.

    Args:
        models: as for `save_run`.

    Returns: the paths, the pipeline first.
    """
    written = []
    if models.ema is not None:
        with models.ema.applied():
            written += _export(output_dir, models, _EMA)
    return _export(output_dir, models, "") + written


def _export(output_dir: Path, models: Models, suffix: str) -> list[Path]:
    written = []
    unet = plain = models.unet
    if has_adapters(unet) or suffix:
        plain = models.family.load_unet(models.source)
        plain.load_state_dict(plain_state(models))
    if has_adapters(unet):
        path = output_dir / (EMA_LORA_FILE if suffix else LORA_FILE)
        with written_beside(path) as beside:
            save_adapters(unet, beside)
        written.append(path)
    name = f"pipeline{suffix}"
    return [export_pipeline(output_dir / name, models.family, models.source, plain), *written]

"""Sample grids during training: the same prompts and the same noise every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sdpo.common.files import written_beside
from sdpo.common.randomness import generator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from sdpo.config import TrainConfig
    from sdpo.models.base import Family
    from sdpo.training.state import Models

SAMPLE_STEPS = 25


@torch.no_grad()
def sample(
    family: Family,
    pipeline: Any,
    prompts: Sequence[str],
    seed: int,
    resolution: int,
    steps: int = SAMPLE_STEPS,
    batch_size: int = 8,
) -> list[Image.Image]:
    """One image a prompt. Prompt i starts from a noise that is a function of (seed, i) alone."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        images += pipeline(
            **family.call_options(pipeline, chunk, family.facts.guidance),
            height=resolution,
            width=resolution,
            num_inference_steps=steps,
            generator=[generator(seed, first + i, "sample") for i in range(len(chunk))],
        ).images
    return images


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Equal-sized images in rows of `columns`, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (255, 255, 255)
    )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a PNG beside and rename it; `options` are those of Pillow's PNG writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        image.save(beside, format="PNG", **options)


def draw_grid(
    config: TrainConfig, models: Models, unet: nn.Module, accelerator: Accelerator, step: int
) -> Path:
    """Sample --validation_prompts from `unet`, write `samples/step-N.png` and log it."""
    family, source = models.base
    with models.encoder.frozen_parts() as frozen:
        images = sample(
            family,
            family.pipeline(unet, frozen, source),
            config.run.validation_prompts,
            config.run.seed,
            config.data.resolution,
        )
    sheet = grid(images, columns=math.ceil(math.sqrt(len(images))))
    path = Path(config.run.output_dir) / "samples" / f"step-{step:06d}.png"
    save_image(sheet, path)
    pixels = np.asarray(sheet)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("samples", pixels, step, dataformats="HWC")
        elif tracker.name == "wandb":
            tracker.log_images({"samples": [pixels]}, step=step)
    return path

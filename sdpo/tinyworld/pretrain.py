"""Train the tiny base models in ``assets/`` from scratch: about an hour on two CPU cores.

    python -m sdpo.tinyworld.pretrain --out assets --seed 0

One autoencoder for all families, then per family the text encoders and the denoiser together. A
quarter of the training scenes show a wrong attribute and two fifths are degraded, so the base is
imperfect in the very ways that the preference pairs can put right. Killed, the same command goes on
behind the last finished stage (autoencoder, then each family); what is in the folder is
replaced when all of them are done.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import replace_directory, write_json
from sdpo.common.flags import Check, at_least, flag, flat, parse
from sdpo.tinyworld import oracle, world
from sdpo.tinyworld.architecture import (
    FAMILIES,
    SIZES,
    Pipeline,
    build_pipeline,
    build_vae,
    save_pipeline,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

PROGRAM = "python -m sdpo.tinyworld.pretrain"
WRONG_ATTRIBUTE_SHARE = 0.25
DEGRADED_SHARE = 0.4
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 5.0
WORK_FOLDER = ".pretrain"
CARD_FILE = "card.json"


@dataclass(frozen=True)
class PretrainConfig:
    """The program's flags; of the counts each is at least 1."""

    out: Path = flag(Path("assets"), "folder of the models' folders")
    families: tuple[str, ...] = flag(FAMILIES, "models to make", choices=FAMILIES)
    size: str = flag("small", "widths of the models", choices=tuple(SIZES))
    seed: int = flag(
        0, "of every random choice", check=Check("not be negative", lambda value: value >= 0)
    )
    vae: Path | None = flag(None, "trained autoencoder to reuse, a diffusers folder")
    images: int = flag(16384, "training images rendered", check=at_least(1))
    vae_steps: int = flag(2100, "optimizer steps of the autoencoder", check=at_least(1))
    vae_batch: int = flag(16, "images a step of it", check=at_least(1))
    unet_steps: int = flag(2800, "optimizer steps of each denoiser", check=at_least(1))
    unet_batch: int = flag(64, "images a step of it", check=at_least(1))
    eval_images: int = flag(256, "images that the oracle scores", check=at_least(1))
    threads: int = flag(2, "CPU threads", check=at_least(1))


def make_dataset(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw the imperfect training set: uint8 images of shape (n, 64, 64, 3) and their captions."""
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    images = np.empty((n, world.IMAGE_SIZE, world.IMAGE_SIZE, 3), dtype=np.uint8)
    captions = []
    for i in tqdm(range(n), desc="render", unit="image"):
        scene = world.sample_scene(rng)
        captions.append(world.caption(scene))
        if rng.random() < WRONG_ATTRIBUTE_SHARE:
            scene = world.wrong_attribute(scene, rng)
        image = world.render(scene)
        if rng.random() < DEGRADED_SHARE:
            image = world.degrade(image, rng)
        images[i] = np.asarray(image)
    return images, captions


def sample_images(
    pipeline: Pipeline, prompts: list[str], seed: int = 0, batch: int = 64
) -> list[Image.Image]:
    """Draw one 64 x 64 image per prompt: 25 steps of the pipeline's scheduler, guidance scale 5."""
    import torch

    from sdpo.tinyworld.denoiser import sampling_options

    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, len(prompts), batch):
        images += pipeline(
            prompts[start : start + batch],
            height=64,
            width=64,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generator,
            **sampling_options(pipeline),
        ).images
    return images


def evaluate(directory: Path, n: int, seed: int) -> dict[str, float]:
    """Score a saved pipeline by the oracle on ``n`` evaluation prompts, weights as reloaded."""
    import torch
    from diffusers import DiffusionPipeline

    prompts = world.evaluation_prompts(n, seed)
    index = json.loads((directory / "model_index.json").read_text())
    # diffusers wants it said that a part is left out.
    absent: Any = {name: None for name, value in index.items() if value == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(directory, **absent).to(torch.float32)
    scores = oracle.mean_score(sample_images(pipeline, prompts, seed), prompts)
    chance = oracle.chance_level(prompts, seed)
    found = vars(scores) | {"chance_follows": chance}
    return {"images": n, **{name: round(value, 4) for name, value in found.items()}}


def _round_to_half(module: torch.nn.Module) -> None:
    """Make the float32 weights what they will be once saved as float16 and reloaded."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())


def asset_name(family: str) -> str:
    """Name a family's folder in ``assets/``."""
    return f"tiny-{family}"


def _start(config: PretrainConfig) -> Path:
    """The folder of finished stages: what an equal call left there, else an empty one."""
    work = config.out / WORK_FOLDER
    values = flat(config)
    flags = {k: str(v) for k, v in values.items() if k not in ("out", "threads", "families")}
    path = work / "flags.json"
    if not (path.is_file() and json.loads(path.read_text()) == flags):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(path, flags)
    return work


def _autoencoder(
    config: PretrainConfig, images: np.ndarray, work: Path
) -> tuple[Any, dict[str, object]]:
    """The shared autoencoder and what its card says: given, from a killed call, or trained now."""
    from diffusers import AutoencoderKL

    from sdpo.tinyworld.autoencoder import (
        encode_latents,
        standardise_latents,
        train_vae,
        vae_quality,
    )

    done, about = work / "vae", work / "vae.json"
    started = time.monotonic()
    if about.is_file():
        return AutoencoderKL.from_pretrained(done).float(), json.loads(about.read_text())
    if config.vae is None:
        vae: Any = build_vae(config.size)
        train_vae(
            vae, images, steps=config.vae_steps, batch_size=config.vae_batch, seed=config.seed
        )
        standardise_latents(vae, encode_latents(vae, images[:2048]))
        _round_to_half(vae)
    else:
        vae = AutoencoderKL.from_pretrained(config.vae).float()
    card = {
        "steps": config.vae_steps,
        "images_per_step": config.vae_batch,
        "reused": config.vae is not None,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "round_trip": vae_quality(vae, config.eval_images, config.seed),
    }
    vae.save_pretrained(done)
    write_json(about, card)
    return vae, card


def pretrain(config: PretrainConfig, argv: Sequence[str]) -> None:
    """Make the models that are missing and put all of them into --out; their cards say `argv`."""
    import torch

    from sdpo.tinyworld.autoencoder import encode_latents
    from sdpo.tinyworld.denoiser import denoiser_of, train_denoiser

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    work = _start(config)
    images, captions = make_dataset(config.images, config.seed)
    vae, vae_card = _autoencoder(config, images, work)
    vae.to(memory_format=torch.channels_last)
    latents = encode_latents(vae, images) * vae.config.scaling_factor
    for family in config.families:
        target = work / asset_name(family)
        if (target / CARD_FILE).is_file():
            continue
        started = time.monotonic()
        pipeline = build_pipeline(family, config.size, config.seed)
        pipeline.vae.load_state_dict(vae.state_dict())
        pipeline.vae.register_to_config(scaling_factor=vae.config.scaling_factor)
        loss = train_denoiser(
            pipeline,
            latents,
            captions,
            steps=config.unet_steps,
            batch=config.unet_batch,
            seed=config.seed,
        )
        minutes = (time.monotonic() - started) / 60
        # The text encoders stay float32: transformers loads the dtype of the file, diffusers
        # float32, and a pipeline loaded without arguments must not mix the two.
        pipeline.vae.half()
        denoiser_of(pipeline).half()
        save_pipeline(pipeline, target)
        card = {
            "command": shlex.join(["python", "-m", "sdpo.tinyworld.pretrain", *argv]),
            "family": family,
            "size": config.size,
            "seed": config.seed,
            "threads": config.threads,
            "training_images": config.images,
            "vae": vae_card,
            "denoiser": {
                "steps": config.unet_steps,
                "images_per_step": config.unet_batch,
                "minutes": round(minutes, 1),
                "final_loss": round(loss, 5),
            },
            "sampling": {"steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE},
            "oracle": evaluate(target, config.eval_images, config.seed),
            "bytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file()),
        }
        write_json(target / CARD_FILE, card)
        print(json.dumps(card, indent=2), flush=True)
    for family in config.families:
        replace_directory(work / asset_name(family), config.out / asset_name(family))
    shutil.rmtree(work)


def main(argv: Sequence[str]) -> int:
    """Train what the flags describe.

    Raises:
        UserError: naming the flag and what would be right.
    """
    about = "Train the tiny base models from scratch and write them with their cards."
    config = parse(PretrainConfig, argv, PROGRAM, about)
    if config.vae is not None and not (config.vae / "config.json").is_file():
        raise UserError(f"--vae {config.vae} holds no config.json; give an autoencoder's folder")
    config.out.mkdir(parents=True, exist_ok=True)
    pretrain(config, argv)
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), PROGRAM)

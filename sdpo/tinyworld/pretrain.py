"""Train the two tiny base models in ``assets/`` from scratch: about half an hour on two CPU cores.

    python -m sdpo.tinyworld.pretrain --out assets --seed 0

One autoencoder for both families, then per family the text encoders and the UNet together. A
quarter of the training scenes show a wrong attribute and two fifths are degraded, so the base is
imperfect in the very ways that the preference pairs can put right. Killed, the same command goes on
behind the last finished stage (autoencoder, first family, second family); what is in the folder is
replaced when all of them are done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.cli import at_least
from sdpo.common.errors import UserError, run_main
from sdpo.common.files import replace_directory, write_json
from sdpo.tinyworld.architecture import FAMILIES, SIZES, build_pipeline, build_vae, save_pipeline

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    from sdpo.tinyworld.architecture import Pipeline

WRONG_ATTRIBUTE_SHARE = 0.25
DEGRADED_SHARE = 0.4
CAPTION_DROPOUT = 0.15
EMA_DECAY = 0.998
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 5.0
WORK_FOLDER = ".pretrain"
CARD_FILE = "card.json"


@dataclass(frozen=True)
class Budget:
    """How long to train: images rendered, optimizer steps and images a step."""

    images: int
    vae_steps: int
    vae_batch: int
    unet_steps: int
    unet_batch: int
    vae_learning_rate: float = 4e-3
    unet_learning_rate: float = 1.5e-3


def make_dataset(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Imperfect training set: uint8 images of shape (n, 64, 64, 3) and their captions."""
    import numpy as np
    from tqdm import tqdm

    from sdpo.tinyworld import world

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


def conditioning(pipeline: Pipeline, token_ids: torch.Tensor) -> dict[str, object]:
    """UNet arguments for token ids (B, 24), as the family's own pipeline computes them."""
    import torch

    from sdpo.tinyworld import world

    first = pipeline.text_encoder(token_ids, output_hidden_states=True)
    if not hasattr(pipeline, "text_encoder_2"):
        return {"encoder_hidden_states": first[0]}
    second = pipeline.text_encoder_2(token_ids, output_hidden_states=True)
    states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
    side = world.IMAGE_SIZE
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    added = {"text_embeds": second[0], "time_ids": time_ids.expand(len(token_ids), -1)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def train_denoiser(
    pipeline: Pipeline, latents: torch.Tensor, captions: list[str], budget: Budget, seed: int
) -> float:
    """Fit UNet and text encoders in place to predict noise; leaves averaged (EMA) weights.

    ``latents`` are scaled, (N, 4, 16, 16). Returns the mean loss of the last tenth of the steps.
    """
    import torch
    from diffusers import DDPMScheduler

    from sdpo.tinyworld.autoencoder import cosine_optimizer

    generator = torch.Generator().manual_seed(seed)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    tokenize = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    token_ids = pipeline.tokenizer(captions, **tokenize).input_ids
    empty_ids = pipeline.tokenizer([""], **tokenize).input_ids
    modules = [pipeline.unet, pipeline.text_encoder]
    modules += [pipeline.text_encoder_2] if hasattr(pipeline, "text_encoder_2") else []
    pipeline.unet.to(memory_format=torch.channels_last)
    parameters = [p for module in modules for p in module.train().parameters()]
    average = [p.detach().clone() for p in parameters]
    losses = []
    steps = budget.unet_steps
    with cosine_optimizer(parameters, budget.unet_learning_rate, steps, "denoiser") as step:
        for i in range(steps):
            index = torch.randint(len(latents), (budget.unet_batch,), generator=generator)
            clean = latents[index]
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = torch.randint(1000, (len(index),), generator=generator)
            dropped = torch.rand(len(index), generator=generator) < CAPTION_DROPOUT
            ids = torch.where(dropped[:, None], empty_ids, token_ids[index])
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            predicted = pipeline.unet(noisy, timesteps, **conditioning(pipeline, ids)).sample
            loss = torch.nn.functional.mse_loss(predicted, noise)
            step(loss)
            losses.append(loss.item())
            decay = min(EMA_DECAY, (i + 1) / (i + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    for module in modules:
        module.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def sample_images(
    pipeline: Pipeline, prompts: list[str], seed: int = 0, batch: int = 64
) -> list[Image.Image]:
    """One 64 x 64 image per prompt: 25 steps of the pipeline's scheduler, guidance scale 5."""
    import torch

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
        ).images
    return images


def evaluate(directory: Path, n: int, seed: int) -> dict[str, float]:
    """Oracle scores of a saved pipeline on ``n`` evaluation prompts, weights as reloaded."""
    import torch
    from diffusers import DiffusionPipeline

    from sdpo.tinyworld import oracle, world

    prompts = world.evaluation_prompts(n, seed)
    pipeline = DiffusionPipeline.from_pretrained(directory).to(torch.float32)
    scores = oracle.mean_score(sample_images(pipeline, prompts, seed), prompts)
    return {
        "images": n,
        "follows": round(scores.follows, 4),
        "clean": round(scores.clean, 4),
        "score": round(scores.score, 4),
        "chance_follows": round(oracle.chance_level(prompts, seed), 4),
    }


def _round_to_half(module: torch.nn.Module) -> None:
    """Make the float32 weights what they will be once saved as float16 and reloaded."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())


def asset_name(family: str) -> str:
    """Folder name of a family's asset."""
    return f"tiny-{family}"


def _start(args: argparse.Namespace) -> Path:
    """The folder of finished stages: what an equal call left there, else an empty one."""
    work = args.out / WORK_FOLDER
    flags = {k: str(v) for k, v in vars(args).items() if k not in ("out", "threads", "families")}
    path = work / "flags.json"
    if not (path.is_file() and json.loads(path.read_text()) == flags):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(path, flags)
    return work


def _autoencoder(
    args: argparse.Namespace, budget: Budget, images: np.ndarray, work: Path
) -> tuple[AutoencoderKL, dict[str, object]]:
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
    if args.vae is None:
        vae = build_vae(args.size)
        train_vae(
            vae,
            images,
            steps=budget.vae_steps,
            batch_size=budget.vae_batch,
            learning_rate=budget.vae_learning_rate,
            seed=args.seed,
        )
        standardise_latents(vae, encode_latents(vae, images[:2048]))
        _round_to_half(vae)
    else:
        vae = AutoencoderKL.from_pretrained(args.vae).float()
    card = {
        "steps": budget.vae_steps,
        "images_per_step": budget.vae_batch,
        "reused": args.vae is not None,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "round_trip": vae_quality(vae, args.eval_images, args.seed),
    }
    vae.save_pretrained(done)
    write_json(about, card)
    return vae, card


def _pretrain(args: argparse.Namespace, argv: list[str]) -> None:
    import torch

    from sdpo.tinyworld.autoencoder import encode_latents

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work = _start(args)
    budget = Budget(args.images, args.vae_steps, args.vae_batch, args.unet_steps, args.unet_batch)
    images, captions = make_dataset(budget.images, args.seed)
    vae, vae_card = _autoencoder(args, budget, images, work)
    vae.to(memory_format=torch.channels_last)
    latents = encode_latents(vae, images) * vae.config.scaling_factor
    for family in args.families:
        target = work / asset_name(family)
        if (target / CARD_FILE).is_file():
            continue
        started = time.monotonic()
        pipeline = build_pipeline(family, args.size, args.seed)
        pipeline.vae.load_state_dict(vae.state_dict())
        pipeline.vae.register_to_config(scaling_factor=vae.config.scaling_factor)
        loss = train_denoiser(pipeline, latents, captions, budget, args.seed)
        minutes = (time.monotonic() - started) / 60
        # The text encoders stay float32: transformers loads the dtype of the file, diffusers
        # float32, and a pipeline loaded without arguments must not mix the two.
        pipeline.vae.half()
        pipeline.unet.half()
        save_pipeline(pipeline, target)
        card = {
            "command": shlex.join(["python", "-m", "sdpo.tinyworld.pretrain", *argv]),
            "family": family,
            "size": args.size,
            "seed": args.seed,
            "threads": args.threads,
            "training_images": budget.images,
            "vae": vae_card,
            "denoiser": {
                "steps": budget.unet_steps,
                "images_per_step": budget.unet_batch,
                "minutes": round(minutes, 1),
                "final_loss": round(loss, 5),
            },
            "sampling": {"steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE},
            "oracle": evaluate(target, args.eval_images, args.seed),
            "bytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file()),
        }
        write_json(target / CARD_FILE, card)
        print(json.dumps(card, indent=2), flush=True)
    for family in args.families:
        replace_directory(work / asset_name(family), args.out / asset_name(family))
    shutil.rmtree(work)


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="python -m sdpo.tinyworld.pretrain",
        description="Train the tiny base models from scratch and write them with their cards.",
    )
    parser.add_argument("--out", type=Path, default=Path("assets"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="trained autoencoder to reuse, a diffusers folder")
    parser.add_argument("--images", type=int, default=16384, help="training images rendered")
    parser.add_argument("--vae_steps", type=int, default=2100)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--unet_steps", type=int, default=2800)
    parser.add_argument("--unet_batch", type=int, default=64)
    parser.add_argument("--eval_images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    counts = ("images", "vae_steps", "vae_batch", "unet_steps", "unet_batch", "threads")
    at_least(args, 1, *counts, "eval_images")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    if args.vae is not None and not (args.vae / "config.json").is_file():
        raise UserError(f"--vae {args.vae} holds no config.json; give an autoencoder's folder")
    args.out.mkdir(parents=True, exist_ok=True)
    _pretrain(args, argv)


if __name__ == "__main__":
    run_main(main, "python -m sdpo.tinyworld.pretrain")

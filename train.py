"""Train a UNet on preference pairs: `accelerate launch train.py ...`, or on one device
`python train.py ...`. This file wires; losses, data, models and loop are in `sdpo/`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from sdpo.args import parse_args
from sdpo.common.errors import UserError, run_main
from sdpo.training.sharding import check_deepspeed, check_sharding

log = logging.getLogger("sdpo")


def main() -> int:
    """Check the flags, build, train, export; returns the exit code."""
    args = parse_args(sys.argv[1:])
    sharding, deepspeed = check_sharding(args), check_deepspeed(args)

    import torch

    from sdpo.common.precision import DTYPES
    from sdpo.data.flags import choice_weights
    from sdpo.data.loader import PairLoader, steps_for_epochs
    from sdpo.data.order import FIRST
    from sdpo.data.source import open_pairs
    from sdpo.evaluation.score.relabel import relabel
    from sdpo.evaluation.score.scoring import ScoreOptions
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.ema import Ema
    from sdpo.models.encoding import build_encoder
    from sdpo.models.reference import build_reference
    from sdpo.training.accumulation import Accumulation, OwnAccumulation
    from sdpo.training.checkpoint import Progress, clear_unfinished, load_training, read_progress
    from sdpo.training.optim import build_optimizer, build_scheduler, restore, scaled_learning_rate
    from sdpo.training.run import Trainer
    from sdpo.training.runlog import describe_run, write_config
    from sdpo.training.saving import export_run, load_ema, load_weights
    from sdpo.training.sharding import divided, gathered, shard
    from sdpo.training.speed import compile_forward, to_channels_last
    from sdpo.training.state import Models

    accelerator = build_accelerator(args)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        clear_unfinished(output_dir)
    accelerator.wait_for_everyone()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    family = get_family(args.sdxl)
    source = ModelSource.from_args(args)
    resume_from = find_checkpoint(args)
    start = read_progress(resume_from, args) if resume_from else Progress(0, FIRST)
    check_same_start(accelerator, start.step)
    family.load_unet_config(source)
    with accelerator.local_main_process_first():
        pairs = open_pairs(args)
    if args.choice_model:
        pairs = relabel(
            pairs,
            args,
            ScoreOptions(weights=choice_weights(args), cache_dir=args.cache_dir),
            accelerator,
        )
    cache = None
    if args.cache_dir_latents:
        from sdpo.data.latents.prepare import prepare_cache

        cache = prepare_cache(pairs, args, family, source, accelerator)
    loader = PairLoader(
        pairs,
        args,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=start.place,
        pin_memory=accelerator.device.type == "cuda",
        cache=cache,
    )
    max_train_steps = args.max_train_steps or steps_for_epochs(
        args.num_train_epochs, loader.steps_per_epoch, args.gradient_accumulation_steps
    )

    weight_dtype = DTYPES[args.mixed_precision]
    with accelerator.local_main_process_first():
        unet = family.load_unet(source)
        encoder = build_encoder(
            family, source, args.resolution, accelerator.device, weight_dtype, cache
        )
    if args.channels_last:
        to_channels_last(unet, encoder)
    unet_parameters = sum(p.numel() for p in unet.parameters())
    reference = build_reference(unet, args, weight_dtype, accelerator.device)
    if resume_from:
        load_weights(resume_from, unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.compile:
        compile_forward(unet, reference)

    ema = Ema(unet, args.ema_decay) if args.use_ema else None
    if resume_from:
        training = load_training(resume_from)
        if ema is not None:
            load_ema(resume_from, training, unet, ema)
    skeleton = None
    if sharding:
        skeleton = shard(unet, sharding, accelerator.device, accelerator.num_processes)
    learning_rate = scaled_learning_rate(args, accelerator.num_processes)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    if sharding and ema is not None:
        ema = ema.of(unet, [divided(*pair) for pair in zip(ema.averages, trainable, strict=True)])
    optimizer = build_optimizer(trainable, args, learning_rate)
    accumulation: Accumulation
    if deepspeed:
        from sdpo.zero import ZeroAccumulation, ZeroOptimizer

        optimizer = ZeroOptimizer(unet, optimizer, args)
        accumulation = ZeroAccumulation(optimizer)
    else:
        unet = unet if sharding else accelerator.prepare(unet)
        accumulation = OwnAccumulation(accelerator, unet, args.max_grad_norm)
    scheduler = build_scheduler(optimizer, args, max_train_steps)
    optimizer = accelerator.prepare(optimizer)
    if resume_from:
        restore(optimizer, scheduler, training)
        if accelerator.scaler is not None and "scaler" in training:
            accelerator.scaler.load_state_dict(training["scaler"])
        log.info("resuming from %s", resume_from)

    if accelerator.is_main_process:
        resolved = {
            "family": family.name,
            "processes": accelerator.num_processes,
            "sharding": "DeepSpeed" if deepspeed else "FSDP2" if sharding else None,
            "device": str(accelerator.device),
            "pairs": None if args.streaming else len(pairs),
            "pairs_per_step": loader.stride * args.gradient_accumulation_steps,
            "learning_rate": learning_rate,
            "max_train_steps": max_train_steps,
            "unet_parameters": unet_parameters,
            "trainable_parameters": sum(p.numel() for p in trainable),
            "resumed_from": str(resume_from) if resume_from else None,
        }
        write_config(output_dir, describe_run(args, resolved))
        log.info("%s", resolved)
    start_trackers(accelerator, args)

    models = Models(family, source, unet, reference, encoder, ema, skeleton)
    trainer = Trainer(
        args,
        accelerator,
        models,
        loader,
        accumulation,
        optimizer,
        scheduler,
        start,
        max_train_steps,
    )
    code = trainer.train()
    if code == 0:
        finished = gathered(models, accelerator)
        for exported in export_run(output_dir, finished) if finished else ():
            log.info("wrote %s", exported)
    accelerator.end_training()
    return code


def build_accelerator(args: argparse.Namespace) -> Any:
    """The accelerator, and logging on the main process.

    Raises:
        UserError: the device cannot do --mixed_precision, or a tracker is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    from sdpo.common.precision import check_precision
    from sdpo.common.processes import WAIT_LIMIT, quieten_libraries

    output_dir = Path(args.output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(output_dir), logging_dir=str(output_dir / args.logging_dir)
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT_LIMIT)],
        )
    except ValueError as error:
        flag = "--mixed_precision" if "precision" in str(error) else "--report_to"
        raise UserError(f"{flag} {getattr(args, flag[2:])}: {error}") from None
    check_precision("--mixed_precision", args.mixed_precision, accelerator.device)
    logging.basicConfig(
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    quieten_libraries()
    return accelerator


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, or None for a fresh run."""
    from sdpo.training.checkpoint_paths import latest_checkpoint

    if args.resume_from_checkpoint == "none":
        return None
    if args.resume_from_checkpoint == "latest":
        return latest_checkpoint(Path(args.output_dir))
    return Path(args.resume_from_checkpoint)


def check_same_start(accelerator: Any, step: int) -> None:
    """All processes must have found the same checkpoint.

    Raises:
        UserError: they have not, as on machines that do not share a disk.
    """
    from accelerate.utils import gather_object

    steps = gather_object([step])
    if len(set(steps)) > 1:
        raise UserError(
            f"--output_dir: the processes would go on from different steps ({sorted(set(steps))}); "
            f"{accelerator.num_processes} processes need one directory that all of them can read"
        )


def start_trackers(accelerator: Any, args: argparse.Namespace) -> None:
    """Start --report_to's trackers; flags that they cannot store are given as text."""
    plain = (bool, int, float, str)
    config = {k: v if isinstance(v, plain) else str(v) for k, v in vars(args).items()}
    accelerator.init_trackers(args.tracker_project_name, config=config)


if __name__ == "__main__":
    run_main(main, "train.py")

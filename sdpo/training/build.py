"""From settings to pairs and models: for training, and for whatever else needs the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from sdpo.common.files import file_sha256
from sdpo.common.precision import DTYPES
from sdpo.data.buckets import in_buckets
from sdpo.data.latents.encoder import build_encoder
from sdpo.data.latents.prepare import prepare_cache
from sdpo.data.loader import PairLoader
from sdpo.models.ema import Ema
from sdpo.models.encoding import Encoder, ModelEncoder
from sdpo.models.reference import (
    Reference,
    build_reference,
    config_digest,
    settings_of,
    weights_digest,
)
from sdpo.training.checkpoint import check_reference, load_ema, load_weights
from sdpo.training.reference_cache.prepare import check_before_models, open_errors
from sdpo.training.sharding import Sharding, divided, shard
from sdpo.training.state import Models, Session

if TYPE_CHECKING:
    from sdpo.config import TrainConfig
    from sdpo.data.source import PairSource
    from sdpo.models import Base


def build_loader(config: TrainConfig, base: Base, pairs: PairSource, run: Session) -> PairLoader:
    """Build the stream of batches of this process; encodes what --cache_dir_latents lacks.

    Raises:
        UserError: the cache does not fit, or cannot be completed.
    """
    accelerator = run.accelerator
    with accelerator.local_main_process_first():  # which keeps the sizes that it reads
        pairs = in_buckets(pairs, config.data)
    cache = None
    if config.data.cache_dir_latents:
        cache = prepare_cache(pairs, config, *base, accelerator)
    return PairLoader(
        pairs,
        config,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=run.progress.place,
        pin_memory=accelerator.device.type == "cuda",
        cache=cache,
    )


def build_models(config: TrainConfig, base: Base, loader: PairLoader, run: Session) -> Models:
    """Build the trained UNet, its frozen reference and the encoder, on the run's device and with
    the weights that the run goes on from.

    Raises:
        UserError: a model or a checkpoint is not to be had or does not fit.
    """
    model, device, dtype = config.model, run.device, DTYPES[config.optim.mixed_precision]
    family, source = base
    key = check_before_models(config, base, loader, run) if model.cache_reference else None
    with run.accelerator.local_main_process_first():
        unet = family.load_unet(source)
        encoder = build_encoder(
            family,
            source,
            config.data.resolution,
            device,
            dtype,
            loader.cache,
            model.offload_text_encoders,
        )
    digest = weights_digest(unet)
    if model.lora_init:
        digest += file_sha256(Path(model.lora_init))
    settings = settings_of(unet, family.load_scheduler(source))
    if run.resume_from:
        check_reference(run.resume_from, digest, settings)
    if config.optim.channels_last:
        to_channels_last(unet, encoder)
    parameters = sum(p.numel() for p in unet.parameters())
    cached = None
    if key:
        key |= {"reference": digest, "settings": config_digest(unet)}
        cached = open_errors(config, key, loader, run)
    needed = cached is None or not cached.complete
    reference = build_reference(unet, model, config.run.seed, dtype, device, needed)
    if run.resume_from:
        load_weights(run.resume_from, unet)
    if config.optim.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.optim.compile:
        compile_forward(unet, reference)
    ema = Ema(unet, model.ema_decay) if model.use_ema else None
    if run.resume_from and ema is not None:
        load_ema(run.resume_from, run.training, unet, ema)
    models = Models(base, unet, reference, encoder, ema, cached, parameters=parameters)
    models.reference_digest, models.settings = digest, settings
    if run.sharding:
        _shard(models, run.sharding, device, run.accelerator.num_processes)
    else:
        if family.facts.idle_weights:
            # Or processes wait for gradients that do not come.
            run.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        models.unet = run.accelerator.prepare(unet)
    return models


def _shard(models: Models, how: Sharding, device: torch.device, processes: int) -> None:
    models.skeleton = shard(models.unet, how, device, processes)
    if models.ema is not None:
        pairs = zip(models.ema.averages, models.trainable, strict=True)
        models.ema = models.ema.of(models.unet, [divided(*pair) for pair in pairs])


def to_channels_last(unet: nn.Module, encoder: Encoder) -> None:
    """Give the 4-dimensional weights of UNet and VAE the memory order (N, H, W, C), in place.

    Activations follow the weights, and so does a reference that is copied from the UNet afterwards.
    Names, shapes and values stay; files are written in the usual order. An encoder that reads from
    a cache has no VAE. Results differ from the plain path's by rounding.
    """
    modules = [unet, encoder.frozen.vae] if isinstance(encoder, ModelEncoder) else [unet]
    for module in modules:
        # Module.to would ask it of a video VAE's weights too, which have 5 dimensions.
        for weight in module.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)


def compile_forward(unet: nn.Module, reference: Reference | None) -> None:
    """torch.compile UNet and reference in place; results differ by rounding.

    Unlike `torch.compile(module)` this wraps nothing: the names of weights in checkpoints, and what
    takes a module apart or copies it, do not notice.
    """
    # A reference on the CPU holds its module; one that is the UNet without adapters has none of
    # its own.
    for module in (unet, getattr(reference, "module", reference)):
        if isinstance(module, nn.Module):
            module.compile()

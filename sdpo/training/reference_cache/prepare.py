"""Open the cache that a run needs, checked to be made for it, and see whether all is there."""

from __future__ import annotations

import hashlib
import json
import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from sdpo.common.processes import on_main, together
from sdpo.config.model import REFERENCE_FLAG
from sdpo.data.digest import describe_pairs
from sdpo.data.latents.identity import dataset_digest, text_digest, vae_digest
from sdpo.data.latents.key import TRANSFORM
from sdpo.models.checks import SCHEDULER_FILE
from sdpo.models.locations import reader_of
from sdpo.training.reference_cache.errors import CachedErrors
from sdpo.training.reference_cache.key import (
    MADE_OF,
    check_key,
    claim,
    key_digest,
    key_of_flags,
)
from sdpo.training.reference_cache.records import Records, refuse_foreign

if TYPE_CHECKING:
    from sdpo.config import TrainConfig
    from sdpo.data.loader import PairLoader
    from sdpo.models import Base
    from sdpo.models.base import ModelSource
    from sdpo.training.state import Session

log = logging.getLogger(__name__)


def check_before_models(
    config: TrainConfig, base: Base, loader: PairLoader, run: Session
) -> dict[str, Any]:
    """Make the key of the cache that a run needs, all but the reference itself, from the files of
    its data, VAE and text encoders. Called by every process.

    Raises:
        UserError: a cache is there that was made for something else, or a model's files are not to
            be had.
    """

    def make() -> dict[str, Any]:
        family, source = base
        data, pairs = config.data, loader.source
        described = describe_pairs(pairs)
        assert described is not None
        key = key_of_flags(config) | {
            "transform": TRANSFORM,
            "stride": loader.stride if data.resize == "bucket" else None,
            "schedule": _schedule_digest(source),
            "vae": vae_digest(source),
            "text": text_digest(family, source),
            "pairs": described["sha256"],
            "images": dataset_digest(pairs),
        }
        where = f"{data.location} ({data.split}, {len(pairs)} of {len(pairs.given)} rows)"
        named = {"schedule": source.base, "vae": source.vae or source.base, "text": source.base}
        named |= dict.fromkeys(("pairs", "images"), where)
        named |= dict.fromkeys(("reference", "settings"), _reference_name(config))
        key[MADE_OF] = named
        check_key(Path(config.model.cache_reference or ""), key)
        return key

    return on_main(run.accelerator, make)


def _schedule_digest(source: ModelSource) -> str:
    read = reader_of(source.base, source.revision, source.cache_dir)
    known = {k: v for k, v in (read(SCHEDULER_FILE) or {}).items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _reference_name(config: TrainConfig) -> str:
    flags = ("pretrained_model_name_or_path", "unet_init", "lora_init")
    given = {name: getattr(config.model, name) for name in flags}
    return ", ".join(f"--{name} {value}" for name, value in given.items() if value)


def open_errors(
    config: TrainConfig, key: dict[str, Any], loader: PairLoader, run: Session
) -> CachedErrors:
    """Open the cache of the whole `key`, or begin it, and see whether it has all that the rest of
    the run will ask for. Called by every process.

    Raises:
        UserError: it was made for something else.
    """
    directory = Path(config.model.cache_reference or "")
    digest = key_digest(key)

    def begin() -> None:
        if not check_key(directory, key):
            refuse_foreign(directory, digest)  # before a key is written that is not theirs
        claim(directory, key)

    on_main(run.accelerator, begin)
    records = together(lambda: Records(directory, digest))
    assert loader.order
    optim, done = config.optim, run.progress
    steps = (loader.max_train_steps - done.step) * optim.gradient_accumulation_steps
    coming = islice(loader.order.steps(done.place), max(0, steps))
    there = [records.has(*place, loader.stride) for place in coming]
    complete = all(gather_object([all(there)]))
    found = f"of {len(there)} micro-batches {sum(there)} are there, the rest is added"
    log.info("%s %s: %s", REFERENCE_FLAG, directory, "all is there" if complete else found)
    # The reference of a divided UNet with adapters is that UNet: its processes compute together.
    alone = not (run.sharding and config.model.lora_rank)
    return CachedErrors(records, complete, alone)

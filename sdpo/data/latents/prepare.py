"""Opening the cache that a run needs; what it lacks is encoded first, by all processes together."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.common.precision import DTYPES
from sdpo.config import TrainConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.data.latents.build import Builder, Work, all_captions
from sdpo.data.latents.key import check_key, make_key
from sdpo.data.latents.manifest import (
    Manifest,
    clear_unfinished,
    gather_entries,
    read_manifest,
    start_manifest,
)
from sdpo.data.latents.store import LatentCache, caption_digest
from sdpo.models.base import Family, Frozen, ModelSource, load_frozen_as

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sdpo.data.source import PairSource

log = logging.getLogger(__name__)

LOCK_FILE = "lock"


def prepare_cache(
    pairs: PairSource,
    config: TrainConfig,
    family: Family,
    source: ModelSource,
    accelerator: Accelerator,
) -> LatentCache:
    """The complete cache of --cache_dir_latents. Called by every process.

    VAE and text encoders are loaded where something is missing, and let go of again.

    Raises:
        UserError: the cache was made for something else, is damaged, or cannot be completed.
    """
    from accelerate.utils.memory import clear_device_cache

    directory = Path(config.data.cache_dir_latents)

    def find() -> tuple[dict[str, Any], bool]:
        key = make_key(config, family, source, pairs)
        manifest = read_manifest(directory)
        if manifest is None:
            return key, True
        check_key(directory, manifest.key, key)
        return key, bool(_missing(directory, manifest, pairs))

    key, incomplete = _on_main(accelerator, find)
    if incomplete:
        with accelerator.local_main_process_first():
            dtype = DTYPES[config.optim.mixed_precision]
            frozen = load_frozen_as(family, source, accelerator.device, dtype)
        _build(key, directory, pairs, config, family, frozen, accelerator)
        del frozen
        clear_device_cache(garbage_collection=True)
    return _open(directory, config.data.verify_cache, accelerator)


def _missing(directory: Path, manifest: Manifest, pairs: PairSource) -> Work:
    cache = LatentCache(directory, manifest)
    by_digest = {caption_digest(caption): caption for caption in all_captions(pairs)}
    captions = [by_digest[digest] for digest in cache.missing_captions(by_digest)]
    return Work(cache.missing_rows(pairs.origin), captions)


def _build(
    key: dict[str, Any],
    directory: Path,
    pairs: PairSource,
    config: TrainConfig,
    family: Family,
    frozen: Frozen,
    accelerator: Accelerator,
) -> None:
    def begin() -> tuple[bool, Work]:
        manifest = read_manifest(directory)
        if manifest is None:
            vae = frozen.vae.config
            about = {
                "latent_shape": list(family.latent_shape(frozen, config.data.resolution)),
                "scaling_factor": vae.scaling_factor,
                "shift_factor": vae.shift_factor,
            }
            manifest = start_manifest(directory, key, about)
        check_key(directory, manifest.key, key)
        clear_unfinished(directory, manifest)
        return manifest.key["flips"], _missing(directory, manifest, pairs)

    def finish() -> None:
        if _missing(directory, gather_entries(directory), pairs):
            raise UserError(_apart(directory))

    with _locked(directory, accelerator):
        flips, work = _on_main(accelerator, begin)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        device = accelerator.device
        builder = Builder(directory, family, frozen, device, config, flips, rank, world_size)
        _together(lambda: builder.build(work, pairs))
        _on_main(accelerator, finish)


def _open(directory: Path, verify: bool, accelerator: Accelerator) -> LatentCache:
    def files_of_main() -> list[str]:
        manifest = read_manifest(directory)
        return [shard.file for shard in manifest.shards] if manifest else []

    files = _on_main(accelerator, files_of_main)

    def read() -> LatentCache:
        manifest = read_manifest(directory)
        if manifest is None or [shard.file for shard in manifest.shards] != files:
            raise UserError(_apart(directory))
        cache = LatentCache(directory, manifest)
        if verify:
            cache.verify(accelerator.process_index, accelerator.num_processes)
        return cache

    return _together(read)


def _apart(directory: Path) -> str:
    return (
        f"{CACHE_FLAG}: the processes do not find the same files in {directory}; they need one "
        "directory that all of them can read and write"
    )


def _together(work: Callable[[], Any]) -> Any:
    """`work()` on every process; the first `UserError` of any of them is raised in all, so that
    none waits for one that is gone."""
    from accelerate.utils import gather_object

    value, error = None, None
    try:
        value = work()
    except UserError as raised:
        error = str(raised)
    for found in gather_object([error]):
        if found is not None:
            raise UserError(found)
    return value


def _on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """`work()` of the main process, its value given to all."""
    from accelerate.utils import broadcast_object_list

    value = _together(work if accelerator.is_main_process else lambda: None)
    return broadcast_object_list([value])[0]


@contextmanager
def _locked(directory: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep two runs from building one cache; the lock ends with the process that holds it."""

    def lock() -> Any:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK_FILE, "w")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{CACHE_FLAG}: another run is encoding into {directory}; wait for its end"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): build it by one run alone", directory, error)
        return file

    held = _together(lock if accelerator.is_main_process else lambda: None)
    try:
        yield
    finally:
        if held is not None:
            held.close()

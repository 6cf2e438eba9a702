"""Open the cache that a run needs; what it lacks is encoded first, by all processes together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sdpo.common.errors import UserError
from sdpo.common.files import make_directory
from sdpo.common.precision import DTYPES
from sdpo.common.processes import on_main, together
from sdpo.config import TrainConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.data.buckets import in_buckets
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
    """Complete and open the cache of --cache_dir_latents. Called by every process.

    VAE and text encoders are loaded where something is missing, and let go of again.

    Raises:
        UserError: the cache was made for something else, is damaged, or cannot be completed.
    """
    from accelerate.utils.memory import clear_device_cache

    pairs = in_buckets(pairs, config.data)
    key = on_main(accelerator, lambda: make_key(config, family, source, pairs))
    preparation = _Preparation(key, pairs, config, family, source, accelerator)
    if on_main(accelerator, lambda: bool(preparation.missing())):
        preparation.build()
        clear_device_cache(garbage_collection=True)
    return preparation.open()


@dataclass(frozen=True)
class _Preparation:
    """Bring the cache of a run to what it needs. `build` and `open` are called by every process."""

    key: dict[str, Any]
    pairs: PairSource
    config: TrainConfig
    family: Family
    source: ModelSource
    accelerator: Accelerator

    @property
    def directory(self) -> Path:
        return Path(self.config.data.cache_dir_latents or "")

    def missing(self) -> Work:
        """List what the cache lacks, once it is known to be made for this run."""
        manifest = read_manifest(self.directory) or Manifest(self.key, {})
        check_key(self.directory, manifest.key, self.key)
        cache = LatentCache(self.directory, manifest)
        by_digest = {caption_digest(caption): caption for caption in all_captions(self.pairs)}
        captions = [by_digest[digest] for digest in cache.missing_captions(by_digest)]
        return Work(cache.missing_rows(self.pairs.origin), captions)

    def build(self) -> None:
        """Encode what is missing, each process its share."""
        accelerator, device = self.accelerator, self.accelerator.device
        with accelerator.local_main_process_first():
            dtype = DTYPES[self.config.optim.mixed_precision]
            frozen = load_frozen_as(self.family, self.source, device, dtype)
        with _locked(self.directory, accelerator):
            flips, work = on_main(accelerator, lambda: self._begin(frozen))
            share = accelerator.process_index, accelerator.num_processes
            builder = Builder(
                self.directory, self.family, frozen, device, self.config, flips, *share
            )
            together(lambda: builder.build(work, self.pairs))
            on_main(accelerator, self._finish)

    def _begin(self, frozen: Frozen) -> tuple[bool, Work]:
        assert self.config.data.resolution
        vae: Any = frozen.vae.config
        about = {
            "latent_shape": list(self.family.latent_shape(frozen, self.config.data.resolution)),
            **self.family.normalising(vae),
        }
        manifest = read_manifest(self.directory) or start_manifest(self.directory, self.key, about)
        work = self.missing()
        clear_unfinished(self.directory, manifest)
        return manifest.key["flips"], work

    def _finish(self) -> None:
        gather_entries(self.directory)
        if self.missing():
            raise self._apart()

    def open(self) -> LatentCache:
        """Open the same files on every process; --verify_cache compares their checksums."""
        accelerator = self.accelerator

        def read() -> LatentCache:
            manifest = read_manifest(self.directory)
            if manifest is None or manifest.files != files:
                raise self._apart()
            cache = LatentCache(self.directory, manifest)
            if self.config.data.verify_cache:
                cache.verify(accelerator.process_index, accelerator.num_processes)
            return cache

        nothing = Manifest({}, {})
        files = on_main(accelerator, lambda: (read_manifest(self.directory) or nothing).files)
        return together(read)

    def _apart(self) -> UserError:
        return UserError(
            f"{CACHE_FLAG}: the processes do not find the same files in {self.directory}; they "
            "need one directory that all of them can read and write"
        )


@contextmanager
def _locked(directory: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep two runs from building one cache; the lock ends with the process that holds it."""
    lock = FileLock(directory / LOCK_FILE)

    def take() -> None:
        make_directory(directory, CACHE_FLAG)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{CACHE_FLAG}: another run is encoding into {directory}; wait for its end"
            ) from None
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): build it by one run alone", directory, error)

    on_main(accelerator, take)
    try:
        yield
    finally:
        lock.release()

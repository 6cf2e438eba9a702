"""Scoring manifests: every image is decoded once, every scorer loaded once, what is known is kept.

Scorers are loaded one after another, so the largest decides how much memory is needed; scoring
beside the generation holds them all. Views of the images (small, 8 bit) wait for them in a
temporary file.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.common.images import UndecodableImage, open_image
from sdpo.common.processes import device_of, start
from sdpo.evaluation.generate.manifest import Manifest
from sdpo.evaluation.score.checked_precision import CheckedPrecision
from sdpo.evaluation.score.config import ScoreOptions
from sdpo.evaluation.score.scorers import get_scorer
from sdpo.evaluation.score.table import ScoreTable, read_scores

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCHES_A_SAVE = 8


def fetch_weights(scorers: list[str], options: ScoreOptions) -> None:
    """Bring all that scorers load to this machine, whole; nothing is loaded.

    Raises:
        UserError: something is not to be had.
    """
    for name in scorers:
        scorer = get_scorer(name)
        weights = options.of(name, scorer)
        for part in scorer.needed(weights):
            weights.fetch(part)


View = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, order=True)
class _Item:
    """An image to be scored: a row of one of the tables."""

    table: int
    row: int


def score_manifests(
    manifests: list[Manifest],
    scorers: list[str],
    options: ScoreOptions | None = None,
    accelerator: Accelerator | None = None,
) -> list[ScoreTable]:
    """Score what is missing of several manifests, save, and return all scores.

    With several processes each scores its share; the main one saves.

    Raises:
        UserError: weights that are not to be had, an image that cannot be decoded.
    """
    accelerator = accelerator or start()
    scoring = Scoring(scorers, options or ScoreOptions(), accelerator)
    tables = [scoring.read(manifest) for manifest in manifests]
    accelerator.wait_for_everyone()  # nobody may read what another has already begun to write
    scoring.score(tables)
    if accelerator.is_main_process:
        for table in tables:
            if not table.in_order:  # but in that in which images came
                table.save()
    return tables


class Scoring:
    """Scores by several scorers what is missing of tables.

    Args:
        beside: score again and again while images are made: scorers stay loaded, all at once, and
            no bars are drawn.

    Raises:
        UserError: there is no such device, or a part of the weights that its scorer has not.
    """

    def __init__(
        self,
        scorers: list[str],
        options: ScoreOptions,
        accelerator: Accelerator,
        beside: bool = False,
    ) -> None:
        self.options, self.accelerator, self.beside = options, accelerator, beside
        self.device = device_of(options.how.device, accelerator)
        self.classes = {name: get_scorer(name) for name in scorers}
        self.weights = {name: options.of(name, cls) for name, cls in self.classes.items()}
        self.identities = {name: each.identity() for name, each in self.weights.items()}
        self.loaded: dict[str, CheckedPrecision] = {}

    def read(self, manifest: Manifest) -> ScoreTable:
        """Read the scores that a manifest has, without those by other weights, or in a precision
        that is not the one asked for."""
        table = read_scores(manifest)
        for name in table.about.keys() & self.identities.keys():
            made = table.about[name]
            # Float32 also stands where the precision asked for was tried and found too coarse.
            tried = made.get("precision") == "no" and made.get("float32_difference") is not None
            precise = tried or self.options.how.mixed_precision in ("auto", made.get("precision"))
            if made.get("weights") != self.identities[name] or not precise:
                table.drop(name)
        return table

    def score(self, tables: list[ScoreTable], whole_batches: bool = False) -> None:
        """Score what is missing, of `whole_batches` no more than fills them, and save.

        Raises:
            UserError: weights that are not to be had, an image that cannot be decoded.
        """
        options, accelerator = self.options, self.accelerator
        missing = {
            name: {_Item(t, int(r)) for t, table in enumerate(tables) for r in table.missing(name)}
            for name in self.classes
        }
        items = sorted(set().union(*missing.values()))
        if whole_batches:
            items = items[: len(items) // options.how.batch_size * options.how.batch_size]
            missing = {name: own.intersection(items) for name, own in missing.items()}
        processes = accelerator.num_processes
        shares = [items[rank::processes] for rank in range(processes)]
        mine = shares[accelerator.process_index]
        needed = {name: cls.view for name, cls in self.classes.items() if missing[name]}
        bars = accelerator.is_main_process and not self.beside
        views = decode(tables, mine, set(needed.values()), options.workers, bars)
        for name, view in needed.items():
            todo = [(i, v) for i, v in zip(mine, views[view], strict=True) if i in missing[name]]
            counts = [sum(item in missing[name] for item in share) for share in shares]
            kind = self.classes[name]
            about = {"label": kind.label, "weights": self.identities[name]}
            if kind.meaning:
                about["meaning"] = kind.meaning
            with self._scorer(name) as scorer:
                run = _Run(name, scorer, about, tables, options.how.batch_size, accelerator, bars)
                run.score(todo, counts)

    @contextmanager
    def _scorer(self, name: str) -> Iterator[CheckedPrecision]:
        """A scorer, loaded; gone afterwards unless they stay."""
        from accelerate.utils.memory import clear_device_cache

        if name not in self.loaded:
            scorer = self.classes[name](self.weights[name], self.device)
            wanted = self.options.how.mixed_precision
            self.loaded[name] = CheckedPrecision(name, scorer, wanted, self.device)
        yield self.loaded[name]
        if not self.beside:
            del self.loaded[name]
            clear_device_cache(garbage_collection=True)


def decode(
    tables: list[ScoreTable],
    items: list[_Item],
    kinds: set[View],
    workers: int,
    bar: bool,
) -> dict[View, np.ndarray]:
    """Decode images and keep every kind of view of them, (items, 3, H, W) in a temporary file.

    Raises:
        UserError: an image cannot be decoded; names manifest, row and file.
    """
    from tqdm.auto import tqdm

    def look(item: _Item) -> dict[View, np.ndarray]:
        manifest = tables[item.table].manifest
        path = manifest.entries[item.row].image
        try:
            image = open_image(str(path))
        except UndecodableImage as error:
            raise UserError(
                f"{manifest.path}, row {item.row}: cannot decode {path} ({error}); generate it "
                "again"
            ) from None
        return {kind: kind(image).numpy() for kind in kinds}

    views: dict[View, np.ndarray] = {}
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(
            pool.map(look, items),
            total=len(items),
            desc="decoding",
            unit="image",
            disable=not bar or not items,
        )
        for place, each in enumerate(found):
            for kind, pixels in each.items():
                if kind not in views:
                    views[kind] = _room((len(items), *pixels.shape), pixels.dtype)
                views[kind][place] = pixels
    # A process without items of its own still takes part in the others' exchanges.
    return views or {kind: np.empty((0, 3, 1, 1), np.uint8) for kind in kinds}


def _room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    with tempfile.TemporaryFile(prefix="sdpo-views-") as file:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            # Room that is missing would end the program by a signal when it is written to.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"TMPDIR: {tempfile.gettempdir()} has no room for {size / 2**20:.0f} MiB of "
                f"decoded images ({error.strerror}); name another directory by TMPDIR"
            ) from None
        return np.memmap(file, dtype, "r+", shape=shape)


@dataclass(frozen=True)
class _Run:
    """One scorer over one process's share."""

    name: str
    scorer: CheckedPrecision
    about: dict[str, Any]
    tables: list[ScoreTable]
    batch_size: int
    accelerator: Accelerator
    bar: bool

    def score(self, todo: list[tuple[_Item, np.ndarray]], counts: list[int]) -> None:
        """Score this process's items by their views; `counts` are every process's numbers of them,
        since all save together."""
        from accelerate.utils import gather_object
        from tqdm.auto import tqdm

        a_round = self.batch_size * BATCHES_A_SAVE
        with tqdm(
            total=sum(counts),
            desc=self.about["label"],
            unit="image",
            disable=not self.bar,
        ) as bar:
            for first in range(0, max(counts), a_round):
                self._enter(gather_object(self._some(todo[first : first + a_round], bar)))

    def _some(self, todo: list[tuple[_Item, np.ndarray]], bar: Any) -> list[tuple[_Item, float]]:
        scored: list[tuple[_Item, float]] = []
        for first in range(0, len(todo), self.batch_size):
            batch, views = zip(*todo[first : first + self.batch_size], strict=True)
            prompts = [self.tables[i.table].manifest.prompts[i.row] for i in batch]
            values = self.scorer(torch.from_numpy(np.stack(views)), prompts)
            for item, value in zip(batch, values.tolist(), strict=True):
                if not math.isfinite(value):
                    manifest = self.tables[item.table].manifest
                    raise UserError(
                        f"{self.name}: the score of {manifest.entries[item.row].image} is {value}; "
                        "are the weights damaged?"
                    )
                scored.append((item, value))
            bar.update(min(len(batch) * self.accelerator.num_processes, bar.total - bar.n))
        return scored

    def _enter(self, scored: list[tuple[_Item, float]]) -> None:
        for number, table in enumerate(self.tables):
            here = [(item.row, value) for item, value in scored if item.table == number]
            if not here:
                continue
            rows, values = zip(*here, strict=True)
            table.put(self.name, np.array(rows), np.array(values))
            table.about[self.name] = {
                **self.about,
                "precision": self.scorer.precision,
                "float32_difference": self.scorer.difference,
            }
            if self.accelerator.is_main_process:
                table.save()

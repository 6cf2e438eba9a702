"""Scoring manifests: every image is decoded once, every scorer loaded once, what is known is kept.

Scorers are loaded one after another, so the largest decides how much memory is needed. Views of the
images (small, 8 bit) wait for them in a temporary file.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdpo.common.errors import UserError
from sdpo.common.processes import device_of, start
from sdpo.data.transforms import UndecodableImage, open_image
from sdpo.evaluation.generate.manifest import Manifest
from sdpo.evaluation.score.checked_precision import CheckedPrecision
from sdpo.evaluation.score.config import ScoreOptions
from sdpo.evaluation.score.scorers import get_scorer
from sdpo.evaluation.score.table import ScoreTable, read_scores

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCHES_A_SAVE = 8


def fetch_weights(scorers: list[str], options: ScoreOptions) -> None:
    """Bring the single files of all scorers to this machine, whole.

    Raises:
        UserError: one of them is not to be had.
    """
    for name in scorers:
        scorer = get_scorer(name)
        weights = options.of(name, scorer)
        for part, wanted in scorer.parts.items():
            weights.file(part) if wanted.file else weights.source(part)


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
    from accelerate.utils.memory import clear_device_cache

    options = options or ScoreOptions()
    accelerator = accelerator or start()
    device = device_of(options.how.device, accelerator)
    classes = {name: get_scorer(name) for name in scorers}
    weights = {name: options.of(name, cls) for name, cls in classes.items()}
    identities = {name: each.identity() for name, each in weights.items()}
    tables = [read_scores(manifest) for manifest in manifests]
    accelerator.wait_for_everyone()  # nobody may read what another has already begun to write
    for table in tables:
        for name in scorers:
            _drop_if_stale(table, name, identities[name], options)
    missing = {
        name: {_Item(t, int(r)) for t, table in enumerate(tables) for r in table.missing(name)}
        for name in scorers
    }
    items = sorted(set().union(*missing.values()))
    shares = [items[rank :: accelerator.num_processes] for rank in range(accelerator.num_processes)]
    mine = shares[accelerator.process_index]
    needed = {name: cls.view for name, cls in classes.items() if missing[name]}
    views = decode(tables, mine, set(needed.values()), options.workers, accelerator)
    for name, view in needed.items():
        work = [[i for i in share if i in missing[name]] for share in shares]
        places = [place for place, item in enumerate(mine) if item in missing[name]]
        scorer = classes[name](weights[name], device)
        about = {"label": scorer.label, "weights": identities[name]}
        checked = CheckedPrecision(name, scorer, options.how.mixed_precision, device)
        run = _Run(name, checked, about, views[view], tables, options, accelerator)
        run.score(work, places)
        del scorer, checked, run
        clear_device_cache(garbage_collection=True)
    return tables


def _drop_if_stale(
    table: ScoreTable, name: str, identity: dict[str, Any], options: ScoreOptions
) -> None:
    """Forget scores made by other weights, or in a precision that is not the one asked for."""
    about = table.about.get(name)
    if about is None:
        return
    precise = options.how.mixed_precision in ("auto", about.get("precision"))
    if about.get("weights") != identity or not precise:
        table.drop(name)


def decode(
    tables: list[ScoreTable],
    items: list[_Item],
    kinds: set[View],
    workers: int,
    accelerator: Accelerator,
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
            disable=not accelerator.is_main_process or not items,
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
        return np.memmap(file, dtype, "w+", shape=shape)


@dataclass(frozen=True)
class _Run:
    """One scorer over one process's share."""

    name: str
    scorer: CheckedPrecision
    about: dict[str, Any]
    views: np.ndarray
    tables: list[ScoreTable]
    options: ScoreOptions
    accelerator: Accelerator

    def score(self, work: list[list[_Item]], places: list[int]) -> None:
        """Score this process's items, `places` in `views`; `work` is every process's share."""
        from accelerate.utils import gather_object
        from tqdm.auto import tqdm

        mine = work[self.accelerator.process_index]
        a_round = self.options.how.batch_size * BATCHES_A_SAVE
        rounds = math.ceil(max(map(len, work)) / a_round)
        with tqdm(
            total=sum(map(len, work)),
            desc=self.about["label"],
            unit="image",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            for number in range(rounds):
                part = slice(number * a_round, (number + 1) * a_round)
                self._enter(gather_object(self._some(mine[part], places[part], bar)))

    def _some(self, items: list[_Item], places: list[int], bar: Any) -> list[tuple[_Item, float]]:
        scored: list[tuple[_Item, float]] = []
        for first in range(0, len(items), self.options.how.batch_size):
            batch = items[first : first + self.options.how.batch_size]
            chosen = places[first : first + self.options.how.batch_size]
            views = torch.from_numpy(np.stack([self.views[p] for p in chosen]))
            prompts = [self.tables[i.table].manifest.prompts[i.row] for i in batch]
            values = self.scorer(views, prompts)
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

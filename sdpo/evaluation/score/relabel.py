"""Label preference pairs by a scorer, once, ahead of training:

    python eval/relabel.py --choice_model pickscore --dataset_name yuvalkirstain/pickapic_v2

Scores are kept beside the dataset (as `datasets` keeps it), in batches, so a killed call goes on
where it was; `train.py --choice_model pickscore` with the same data flags finds them there.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.common.flags import flag, parse
from sdpo.config import SourceConfig
from sdpo.config.rules import check_source
from sdpo.data.local import check_data_location
from sdpo.evaluation.score.config import (
    ScoreOptions,
    ScorerConfig,
    check_batch_size,
    parse_weights,
)
from sdpo.evaluation.score.scorers import get_scorer, scorer_names

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from sdpo.data.ai_labels import ChoiceScores
    from sdpo.data.source import PairSource
    from sdpo.evaluation.score.checked_precision import CheckedPrecision
    from sdpo.evaluation.score.weights import Weights

PAIRS_A_SAVE = 2048  # of each process
Scored = tuple[int, float, float]  # row of the dataset, scores of image 0 and 1


@dataclass(frozen=True)
class RelabelConfig:
    """relabel.py's flags; those that name the data are train.py's."""

    data: SourceConfig = field(default_factory=SourceConfig)
    scoring: ScorerConfig = field(default_factory=ScorerConfig)
    seed: int = flag(0, "of --max_train_samples")
    check_only: bool = flag(False, "check the flags, no more")


def parse_args(argv: Sequence[str]) -> RelabelConfig:
    """Parse relabel.py's command line and check it.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(RelabelConfig, argv, "relabel.py", __doc__)
    if config.data.choice_model is None:
        raise UserError("--choice_model is missing: which scorer shall label the pairs?")
    check_source(config.data)
    check_choice_model(config.data)
    check_batch_size(config.scoring)
    check_data_location(config.data)
    return config


def check_choice_model(data: SourceConfig) -> dict[str, str]:
    """Check the flags that name a labelling scorer and its weights; needs no torch.

    Returns:
        --choice_weights taken apart, as `parse_weights`.

    Raises:
        UserError: there is no such scorer; its weights are of another form, of another scorer, or
            not there.
    """
    if data.choice_model is not None and data.choice_model not in scorer_names():
        known = ", ".join(map(repr, scorer_names()))
        raise UserError(
            f"argument --choice_model: invalid choice: {data.choice_model!r} (choose from {known}) "
            "(see --help)"
        )
    weights = parse_weights(data.choice_weights, "--choice_weights")
    for name in weights:
        if name.partition(".")[0] != data.choice_model:
            raise UserError(f"--choice_weights: {name} is not a part of {data.choice_model}")
    return weights


def main() -> int:
    """Score the pairs that are not scored, print the agreement; returns the exit code."""
    config = parse_args(sys.argv[1:])
    if config.check_only:
        return 0

    from sdpo.common.processes import start
    from sdpo.data.source import open_pairs

    accelerator = start()
    with accelerator.local_main_process_first():
        pairs = open_pairs(config.data, config.seed)
    relabel(pairs, config.data, accelerator, config.scoring)
    accelerator.end_training()
    return 0


def relabel(
    pairs: PairSource,
    data: SourceConfig,
    accelerator: Accelerator,
    scoring: ScorerConfig | None = None,
) -> PairSource:
    """Give pairs the labels of --choice_model, scoring those that are not scored yet.

    With several processes each scores its share and the main one saves.

    Args:
        pairs: as `open_pairs` opens them.
        data: the flags that name them and their scorer.
        scoring: where and how the scorer runs.

    Raises:
        UserError: weights that are not to be had.
    """
    from accelerate.utils import broadcast_object_list

    from sdpo.data.ai_labels import ChoiceScores, with_choices

    name = data.choice_model or ""
    options = ScoreOptions(scoring or ScorerConfig(), check_choice_model(data), data.cache_dir)
    weights = options.of(name, get_scorer(name))
    path = choices_path(pairs, data, weights.identity())
    found = ChoiceScores(path, int(pairs.origin.max()) + 1)
    # All go by what the main process, which saves, has found: machines may not share a disk.
    found.scores, found.seen = broadcast_object_list([found.scores, found.seen])
    if len(found.missing(pairs.origin)):
        score_missing(pairs, found, name, weights, options, accelerator)
    labelled, agreement = with_choices(pairs, found)
    if accelerator.is_main_process:
        print(f"{name} {agreement} (scores: {path})")
    return labelled


def choices_path(pairs: PairSource, data: SourceConfig, identity: dict[str, Any]) -> Path:
    """Name the file of scores: beside the dataset's own files in the cache of `datasets`, which
    tells one version of the data from another; of each scorer's weights another, and of each way to
    read images."""
    from sdpo.common.images import READING  # loads numpy

    columns = pairs.columns
    about = [identity, data.caption_column, columns.image_0, columns.image_1, READING]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    first = Path(pairs.rows.cache_files[0]["filename"])
    return first.parent / f"choices-{data.choice_model}-{data.split}-{key}.parquet"


def score_missing(
    pairs: PairSource,
    found: ChoiceScores,
    name: str,
    weights: Weights,
    options: ScoreOptions,
    accelerator: Accelerator,
) -> None:
    """Score the pairs that `found` has not seen, and save after every `PAIRS_A_SAVE`."""
    import numpy as np
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from sdpo.common.processes import device_of
    from sdpo.evaluation.score.checked_precision import CheckedPrecision

    device = device_of(options.how.device, accelerator)
    scorer = get_scorer(name)(weights, device)
    run = CheckedPrecision(name, scorer, options.how.mixed_precision, device)
    places = np.flatnonzero(~found.seen[pairs.origin])
    chunk = PAIRS_A_SAVE * accelerator.num_processes
    with tqdm(
        total=len(places),
        desc=f"labelling with {scorer.label}",
        unit="pair",
        disable=not accelerator.is_main_process,
    ) as bar:
        for first in range(0, len(places), chunk):
            part = places[first : first + chunk]
            mine = part[accelerator.process_index :: accelerator.num_processes]
            scored = gather_object(score_pairs(pairs, mine.tolist(), run, options))
            rows, *sides = zip(*scored, strict=True)
            found.put(rows, np.array(sides).T)
            if accelerator.is_main_process:
                found.save()
            bar.update(len(part))


def score_pairs(
    pairs: PairSource, places: list[int], run: CheckedPrecision, options: ScoreOptions
) -> list[Scored]:
    """Score both images of the pairs at some places; NaN where one of them cannot be decoded."""
    import torch

    from sdpo.common.images import UndecodableImage, open_image

    def look(row: dict[str, Any]) -> torch.Tensor | None:
        try:
            images = [
                open_image(row[c], pairs.base)
                for c in (pairs.columns.image_0, pairs.columns.image_1)
            ]
        except UndecodableImage:
            return None
        return torch.stack([run.scorer.view(image) for image in images])

    scored: list[Scored] = []
    at_once = max(1, options.how.batch_size // 2)
    with ThreadPoolExecutor(options.workers) as pool:
        for first in range(0, len(places), at_once):
            chosen = places[first : first + at_once]
            rows = [pairs.rows[place] for place in chosen]
            views = dict(enumerate(pool.map(look, rows)))
            whole = {i: view for i, view in views.items() if view is not None}
            scores = torch.full((len(chosen), 2), math.nan, dtype=torch.float64)
            if whole:
                captions = [first_caption(rows[i], pairs.columns.caption) for i in whole]
                both = [caption for caption in captions for _ in range(2)]
                found = run(torch.cat(list(whole.values())), both)
                scores[list(whole)] = found.reshape(-1, 2)
            numbers = (int(pairs.origin[place]) for place in chosen)
            scored += [(n, *s) for n, s in zip(numbers, scores.tolist(), strict=True)]
    return scored


def first_caption(row: dict[str, Any], column: str) -> str:
    """Read a pair's caption; of several the first."""
    from sdpo.data.pairs import as_caption

    value = row[column]
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return as_caption(value, column)

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.common.flags import flag, parse
from sdpo.config import SourceConfig
from sdpo.config.rules import check_source
from sdpo.data.local import check_data_location
from sdpo.evaluation.score.config import parse_weights
from sdpo.evaluation.score.scorers import scorer_names

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from sdpo.data.ai_labels import ChoiceScores
    from sdpo.data.source import PairSource
    from sdpo.evaluation.score.checked_precision import CheckedPrecision
    from sdpo.evaluation.score.scoring import ScoreOptions
    from sdpo.evaluation.score.weights import Weights

PAIRS_A_SAVE = 2048  # of each process
Scored = tuple[int, float, float]  # row of the dataset, scores of image 0 and 1


@dataclass(frozen=True)
class RelabelConfig:
    """relabel.py's flags; those that name the data are train.py's."""

    data: SourceConfig = field(default_factory=SourceConfig)
    device: str | None = flag(None, "e.g. cuda:1, mps, cpu", shown="the best there is")
    batch_size: int = flag(32, "images scored at a time", metavar="N")
    mixed_precision: str = flag(
        "auto",
        "of the scorers: auto: fp16 on CUDA, else no; where it changes the first batch's scores by "
        "more than 2% of their spread, float32 is used",
        choices=("auto", "no", "fp16", "bf16"),
    )
    seed: int = flag(0, "of --max_train_samples")
    check_only: bool = flag(False, "check the flags, no more")


def parse_config(argv: list[str]) -> tuple[RelabelConfig, dict[str, str]]:
    """Parse the program's flags; the scorer's weights are given beside them.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(RelabelConfig, argv, "relabel.py", __doc__)
    if config.data.choice_model is None:
        raise UserError("--choice_model is missing: which scorer shall label the pairs?")
    check_source(config.data)
    if config.batch_size < 1:
        raise UserError(f"the scorers' batch size must be at least 1, got {config.batch_size}")
    weights = check_choice_model(config.data)
    check_data_location(config.data)
    return config, weights


def check_choice_model(data: SourceConfig) -> dict[str, str]:
    """Check --choice_model and --choice_weights; returns the weights by scorer and part.

    Raises:
        UserError: an unknown scorer, or weights of another form, of another scorer, or not there.
    """
    known = scorer_names()
    if data.choice_model is not None and data.choice_model not in known:
        names = ", ".join(map(repr, known))
        raise UserError(
            f"argument --choice_model: invalid choice: {data.choice_model!r} (choose from {names})"
        )
    weights = parse_weights(list(data.choice_weights), "--choice_weights")
    for name in weights:
        if name.partition(".")[0] != data.choice_model:
            raise UserError(f"--choice_weights: {name} is not a part of {data.choice_model}")
    return weights


def main() -> int:
    """Score what is missing, print the agreement."""
    config, weights = parse_config(sys.argv[1:])
    if config.check_only:
        return 0

    from sdpo.common.processes import start
    from sdpo.data.source import open_pairs
    from sdpo.evaluation.score.scoring import ScoreOptions

    accelerator = start()
    with accelerator.local_main_process_first():
        pairs = open_pairs(config.data, config.seed)
    options = ScoreOptions(
        weights=weights,
        device=config.device,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
        cache_dir=config.data.cache_dir,
    )
    relabel(pairs, config.data, options, accelerator)
    accelerator.end_training()
    return 0


def relabel(
    pairs: PairSource, data: SourceConfig, options: ScoreOptions, accelerator: Accelerator
) -> PairSource:
    """The pairs with --choice_model's labels; what is not scored yet is scored now.

    With several processes each
    scores its share and the main one saves.

    Raises:
        UserError: weights that are not to be had.
    """
    from accelerate.utils import broadcast_object_list

    from sdpo.data.ai_labels import ChoiceScores, with_choices
    from sdpo.evaluation.score.scorers import get_scorer

    name = data.choice_model
    assert name
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
    """Where the scores are: beside the dataset's own files in the cache of `datasets`, which tells
    one version of the data from another."""
    about = [identity, data.caption_column, pairs.columns.image_0, pairs.columns.image_1]
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
    """Score the pairs that `found` has not seen, and save as it goes."""
    import numpy as np
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from sdpo.common.processes import device_of
    from sdpo.evaluation.score.checked_precision import CheckedPrecision
    from sdpo.evaluation.score.scorers import get_scorer

    device = device_of(options.device, accelerator)
    scorer = get_scorer(name)(weights, device)
    run = CheckedPrecision(name, scorer, options.mixed_precision, device)
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
    """Scores of both images of some pairs; NaN where one of them cannot be decoded."""
    import torch

    from sdpo.data.transforms import UndecodableImage, open_image

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
    at_once = max(1, options.batch_size // 2)
    with ThreadPoolExecutor(options.workers) as pool:
        for first in range(0, len(places), at_once):
            chosen = places[first : first + at_once]
            rows = [pairs.rows[place] for place in chosen]
            views = list(pool.map(look, rows))
            whole = [i for i, view in enumerate(views) if view is not None]
            scores = torch.full((len(chosen), 2), math.nan, dtype=torch.float64)
            if whole:
                prompts = [first_caption(rows[i], pairs.columns.caption) for i in whole]
                stacked = torch.cat([views[i] for i in whole])
                both = [prompt for prompt in prompts for _ in range(2)]
                scores[whole] = run(stacked, both).reshape(-1, 2)
            numbers = (int(pairs.origin[place]) for place in chosen)
            scored += [(n, *s) for n, s in zip(numbers, scores.tolist(), strict=True)]
    return scored


def first_caption(row: dict[str, Any], column: str) -> str:
    """A pair's caption; of several the first."""
    from sdpo.data.pairs import as_caption

    value = row[column]
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    return as_caption(value, column)

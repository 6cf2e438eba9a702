"""Preference pairs of the tiny world, as parquet files in Pick-a-Pic v2's columns.

    python -m sdpo.tinyworld.pairs --out DIR --train 4096 --heldout 256 --seed 0

The winner is a scene drawn as captioned. The loser is the same scene at equal positions, either
degraded or with one wrong attribute: as in real data it stays close to its winner.
"""

from __future__ import annotations

import io
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import written_beside
from sdpo.common.flags import Check, flag, parse

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL import Image

PROGRAM = "python -m sdpo.tinyworld.pairs"
CLEAN = "tinyworld/clean"
DEGRADED = "tinyworld/degraded"
WRONG_ATTRIBUTE = "tinyworld/wrong-attribute"


NOT_NEGATIVE = Check("not be negative", lambda value: value >= 0)
WITHIN_0_1 = Check("lie in [0, 1]", lambda value: 0.0 <= value <= 1.0)


@dataclass(frozen=True)
class PairsConfig:
    """The program's flags."""

    out: Path = flag(None, "folder to write into", required=True)
    train: int = flag(4096, "number of training pairs", check=NOT_NEGATIVE)
    heldout: int = flag(256, "number of held-out pairs", check=NOT_NEGATIVE)
    seed: int = flag(0, "of every random choice", check=NOT_NEGATIVE)
    shards: int = flag(1, "number of training files")
    degraded_share: float = flag(
        0.5, "share of degraded losers; the others have one wrong attribute", check=WITHIN_0_1
    )
    tie_share: float = flag(0.05, "share of ties", check=WITHIN_0_1)
    degradation_strength: float = flag(1.0, "1 is mild, 0 changes nothing", check=NOT_NEGATIVE)


def schema() -> pa.Schema:
    """Name the columns: ``label_i`` is 1.0 where image i is preferred, 0.0 where not, 0.5 in a
    tie."""
    import pyarrow as pa

    types = {
        pa.binary(): "jpg_0 jpg_1",
        pa.float64(): "label_0 label_1",
        pa.string(): "caption model_0 model_1 image_0_uid image_1_uid",
        pa.bool_(): "are_different has_label",
        pa.int64(): "ranking_id",
    }
    return pa.schema([(name, kind) for kind, names in types.items() for name in names.split()])


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _row(
    rng: np.random.Generator, degraded_share: float, tie_share: float, strength: float
) -> dict[str, object]:
    from sdpo.tinyworld import world

    scene = world.sample_scene(rng)
    clean = world.render(scene)
    labels = [1.0, 0.0]
    if rng.random() < tie_share:
        # Neither is better: the same scene, spoilt twice independently.
        labels = [0.5, 0.5]
        sides = [(world.degrade(clean, rng, strength), DEGRADED) for _ in range(2)]
    elif rng.random() < degraded_share:
        sides = [(clean, CLEAN), (world.degrade(clean, rng, strength), DEGRADED)]
    else:
        wrong = world.render(world.wrong_attribute(scene, rng))
        sides = [(clean, CLEAN), (wrong, WRONG_ATTRIBUTE)]
    if rng.random() < 0.5:
        sides.reverse()
        labels.reverse()
    row: dict[str, object] = {
        "caption": world.caption(scene),
        "are_different": True,
        "has_label": True,
    }
    for i, (image, model) in enumerate(sides):
        row[f"jpg_{i}"] = _png(image)
        row[f"label_{i}"] = labels[i]
        row[f"model_{i}"] = model
        row[f"image_{i}_uid"] = str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return row


def build_pairs(
    n: int,
    seed: int | tuple[int, ...],
    *,
    degraded_share: float = 0.5,
    tie_share: float = 0.05,
    degradation_strength: float = 1.0,
    first_ranking_id: int = 0,
    progress: bool = False,
) -> pa.Table:
    """Make a table of ``n`` pairs in the columns of ``schema()``, images as PNG bytes, 64 x 64 RGB.

    Equal arguments give equal tables.

    Args:
        n: at least 0.
        seed: of every random choice.
        degraded_share: share of the labelled losers that are degraded, with
            ``degradation_strength`` (see ``world.degrade``); the others have one wrong attribute.
        tie_share: share of all pairs that are ties.
        first_ranking_id: of the first pair; the others' follow.
        progress: show a bar.

    Raises:
        ValueError: on a negative ``n`` or strength, or a share outside [0, 1].
    """
    import numpy as np
    import pyarrow as pa
    from tqdm import tqdm

    if n < 0:
        raise ValueError(f"number of pairs must not be negative, got {n}")
    if degradation_strength < 0:
        raise ValueError(f"degradation_strength must not be negative, got {degradation_strength}")
    for name, share in (("degraded_share", degraded_share), ("tie_share", tie_share)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    rng = np.random.default_rng(seed)
    rows = []
    for i in tqdm(range(n), desc="pairs", unit="pair", disable=not progress):
        row = _row(rng, degraded_share, tie_share, degradation_strength)
        rows.append(row | {"ranking_id": first_ranking_id + i})
    return pa.Table.from_pylist(rows, schema=schema())


def write_pairs(
    directory: str | PathLike[str],
    n_train: int,
    n_heldout: int,
    seed: int,
    *,
    shards: int = 1,
    progress: bool = False,
    **difficulty: float,
) -> list[Path]:
    """Write ``train-*-of-*.parquet`` (``shards`` of them) and one ``heldout-*.parquet``.

    Splits and shards draw from different random streams of ``seed``. Each file is written beside
    its name first, so that none is ever half there.

    Args:
        difficulty: the shares and the strength that ``build_pairs`` takes.

    Returns: the paths; a split of 0 pairs is left out.

    Raises:
        ValueError: on sizes below 0, shards below 1 or more shards than training pairs.
    """
    import pyarrow.parquet as pq

    if n_train < 0 or n_heldout < 0:
        raise ValueError("numbers of pairs must not be negative")
    if shards < 1 or shards > max(n_train, 1):
        raise ValueError(f"shards must be from 1 to the number of training pairs, got {shards}")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    bounds = [n_train * i // shards for i in range(shards + 1)]
    plan = [("train", i, shards, bounds[i], bounds[i + 1]) for i in range(shards)]
    plan.append(("heldout", 0, 1, n_train, n_train + n_heldout))
    written = []
    for split, index, count, start, stop in plan:
        if start == stop:
            continue
        table = build_pairs(
            stop - start,
            (seed, int(split == "heldout"), index),
            first_ranking_id=start,
            progress=progress,
            **difficulty,
        )
        written.append(target / f"{split}-{index:05d}-of-{count:05d}.parquet")
        with written_beside(written[-1]) as beside:
            pq.write_table(table, beside, row_group_size=256)
    return written


def ensure_pairs(target: Path, train: int, heldout: int, seed: int, progress: bool = False) -> None:
    """Write pairs as ``write_pairs`` does, unless there are pairs of both splits."""
    if not all(list(target.glob(f"{split}-*.parquet")) for split in ("train", "heldout")):
        write_pairs(target, train, heldout, seed, progress=progress)


def main(argv: Sequence[str]) -> int:
    """Write the pairs that the flags describe and print the files' paths.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(
        PairsConfig, argv, PROGRAM, "Write preference pairs of the tiny world as parquet files."
    )
    if not 1 <= config.shards <= max(config.train, 1):
        raise UserError(f"--shards must be from 1 to --train ({config.train}), got {config.shards}")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out} exists and is not a folder")
    paths = write_pairs(
        config.out,
        config.train,
        config.heldout,
        config.seed,
        shards=config.shards,
        progress=True,
        degraded_share=config.degraded_share,
        tie_share=config.tie_share,
        degradation_strength=config.degradation_strength,
    )
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), PROGRAM)

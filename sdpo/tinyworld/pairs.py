"""Preference pairs of the tiny world, as parquet files in Pick-a-Pic v2's columns.

    python -m sdpo.tinyworld.pairs --out DIR --train 4096 --heldout 256 --seed 0

The winner is a scene drawn as captioned. The loser is the same scene at equal positions, either
degraded or with one wrong attribute: as in real data it stays close to its winner.
"""

from __future__ import annotations

import argparse
import io
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError, run_main

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL import Image

CLEAN = "tinyworld/clean"
DEGRADED = "tinyworld/degraded"
WRONG_ATTRIBUTE = "tinyworld/wrong-attribute"


def schema() -> pa.Schema:
    """The columns: ``label_i`` is 1.0 where image i is preferred, 0.0 where not, 0.5 in a tie."""
    import pyarrow as pa

    return pa.schema(
        [
            ("jpg_0", pa.binary()),
            ("jpg_1", pa.binary()),
            ("label_0", pa.float64()),
            ("label_1", pa.float64()),
            ("caption", pa.string()),
            ("model_0", pa.string()),
            ("model_1", pa.string()),
            ("image_0_uid", pa.string()),
            ("image_1_uid", pa.string()),
            ("are_different", pa.bool_()),
            ("has_label", pa.bool_()),
            ("ranking_id", pa.int64()),
        ]
    )


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
    winner_label = 1.0
    if rng.random() < tie_share:
        # Neither is better: the same scene, spoilt twice independently.
        winner_label = 0.5
        sides = [(world.degrade(clean, rng, strength), DEGRADED) for _ in range(2)]
    elif rng.random() < degraded_share:
        sides = [(clean, CLEAN), (world.degrade(clean, rng, strength), DEGRADED)]
    else:
        wrong = world.render(world.wrong_attribute(scene, rng))
        sides = [(clean, CLEAN), (wrong, WRONG_ATTRIBUTE)]
    labels = [winner_label, 1.0 - winner_label]
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
    """Table of ``n`` pairs in the columns of ``schema()``; images are PNG bytes, 64 x 64 RGB.

    ``degraded_share`` of the labelled losers are degraded with ``degradation_strength`` (see
    ``world.degrade``), the others have one wrong attribute; ``tie_share`` of all pairs are ties.
    Equal arguments give equal tables. Raises ValueError for a negative ``n`` or strength, or a
    share outside [0, 1].
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
    directory: str | os.PathLike[str],
    n_train: int,
    n_heldout: int,
    seed: int,
    *,
    shards: int = 1,
    degraded_share: float = 0.5,
    tie_share: float = 0.05,
    degradation_strength: float = 1.0,
    progress: bool = False,
) -> list[Path]:
    """Write ``train-*-of-*.parquet`` (``shards`` of them) and one ``heldout-*.parquet``.

    Splits and shards draw from different random streams of ``seed``. Each file is written beside
    its name first, so that none is ever half there. Returns the paths; a split of 0 pairs is left
    out. Raises ValueError for sizes below 0, shards below 1 or more shards than training pairs.
    """
    import pyarrow.parquet as pq

    if n_train < 0 or n_heldout < 0:
        raise ValueError("numbers of pairs must not be negative")
    if shards < 1 or shards > max(n_train, 1):
        raise ValueError(f"shards must be from 1 to the number of training pairs, got {shards}")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    plan = [
        ("train", i, shards, n_train * i // shards, n_train * (i + 1) // shards)
        for i in range(shards)
    ]
    plan.append(("heldout", 0, 1, n_train, n_train + n_heldout))
    written = []
    for split, index, count, start, stop in plan:
        if start == stop:
            continue
        table = build_pairs(
            stop - start,
            (seed, int(split == "heldout"), index),
            degraded_share=degraded_share,
            tie_share=tie_share,
            degradation_strength=degradation_strength,
            first_ranking_id=start,
            progress=progress,
        )
        path = target / f"{split}-{index:05d}-of-{count:05d}.parquet"
        beside = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, beside, row_group_size=256)
        os.replace(beside, path)
        written.append(path)
    return written


def ensure_pairs(target: Path, train: int, heldout: int, seed: int, progress: bool = False) -> None:
    """`write_pairs`, unless there are pairs of both splits."""
    if not all(list(target.glob(f"{split}-*.parquet")) for split in ("train", "heldout")):
        write_pairs(target, train, heldout, seed, progress=progress)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdpo.tinyworld.pairs",
        description="Write preference pairs of the tiny world as parquet files.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=int, default=4096, help="number of training pairs")
    parser.add_argument("--heldout", type=int, default=256, help="number of held-out pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="number of training files")
    parser.add_argument(
        "--degraded_share",
        type=float,
        default=0.5,
        help="share of degraded losers; the others have one wrong attribute",
    )
    parser.add_argument("--tie_share", type=float, default=0.05, help="share of ties")
    parser.add_argument(
        "--degradation_strength", type=float, default=1.0, help="1 is mild, 0 changes nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Command line entry; exits with code 2 and one sentence on bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    for flag in ("train", "heldout", "seed", "degradation_strength"):
        value = getattr(args, flag)
        if not value >= 0:
            raise UserError(f"--{flag} must not be negative, got {value}")
    if not 1 <= args.shards <= max(args.train, 1):
        raise UserError(f"--shards must be from 1 to --train ({args.train}), got {args.shards}")
    for flag in ("degraded_share", "tie_share"):
        if not 0.0 <= getattr(args, flag) <= 1.0:
            raise UserError(f"--{flag} must lie in [0, 1], got {getattr(args, flag)}")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} exists and is not a folder")
    paths = write_pairs(
        args.out,
        args.train,
        args.heldout,
        args.seed,
        shards=args.shards,
        degraded_share=args.degraded_share,
        tie_share=args.tie_share,
        degradation_strength=args.degradation_strength,
        progress=True,
    )
    for path in paths:
        print(path)


if __name__ == "__main__":
    run_main(main, "python -m sdpo.tinyworld.pairs")

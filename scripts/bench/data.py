"""Pairs per second that one process's data loader gives: Parquet, streaming and the latent cache.

    bash scripts/bench/data.sh [--resolution 512] [--rows 256] [--workers 0 2]

Pairs are drawn scenes, enlarged to --resolution, with noise, as JPEG in Parquet shards. The
loaders are train.py's own and take turns of --batches batches each. The cache holds latents of the
size that SD1.5's VAE makes at --resolution: the tiny model's VAE shrinks by 4 instead of 8, so it
encodes at half of it. Its text embeddings are the tiny model's (24 x 64 instead of 77 x 768); the
bytes that a pair takes are in the table. Pages read twice come from memory, in every variant.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.common import (
    TINY_MODEL,
    parser,
    print_table,
    ratios,
    spread,
    write_result,
)
from sdpo.common.cli import at_least
from sdpo.common.errors import UserError, run_main

SOURCES = ("parquet", "streaming", "cache")
SHARDS = 4
NOISE = 6.0  # standard deviation, of 255: a photograph's grain, so that JPEG has something to do


def parse() -> argparse.Namespace:
    """The benchmark's flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    found = parser("data.py", __doc__)
    add = found.add_argument
    add("--resolution", type=int, default=512, metavar="PX", help="default: 512")
    add("--rows", type=int, default=128, help="default: 128")
    add("--batch", type=int, default=8, metavar="PAIRS", help="default: 8")
    add("--batches", type=int, default=4, help="batches of a turn, default: 4")
    add("--turns", type=int, default=8, help="default: 8")
    add("--workers", type=int, nargs="+", default=[0], help="data workers, default: 0")
    args = found.parse_args()
    at_least(args, 1, "rows", "batch", "batches", "turns")
    at_least(args, 0, "workers")
    if args.resolution % 16 or args.resolution < 16:
        raise UserError(f"--resolution must be a multiple of 16, got {args.resolution}")
    if args.rows < SHARDS * args.batch:
        raise UserError(
            f"--rows must be at least {SHARDS * args.batch}, {SHARDS} shards of a batch"
        )
    return args


def write_rows(directory: Path, rows: int, side: int) -> int:
    """Write pairs whose images are JPEG, `side` pixels square; returns the bytes on disk."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from sdpo.tinyworld.pairs import build_pairs

    rng = np.random.default_rng(0)

    def enlarged(data: bytes) -> bytes:
        image = Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BICUBIC)
        grain = rng.normal(0, NOISE, (side, side, 3))
        pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        return buffer.getvalue()

    table = build_pairs(rows, 0, tie_share=0.0)
    for name in ("jpg_0", "jpg_1"):
        images = [enlarged(value.as_py()) for value in table[name]]
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, pa.array(images, pa.binary()))
    directory.mkdir()
    per_shard = -(-rows // SHARDS)
    for i in range(SHARDS):
        path = directory / f"train-{i:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(table.slice(i * per_shard, per_shard), path, row_group_size=32)
    return _bytes_of(directory)


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def open_loader(bench: argparse.Namespace, work: Path, source: str, workers: int) -> Any:
    """train.py's loader of one kind; the cache is made by the first that asks."""
    from accelerate import Accelerator

    from sdpo.args import parse_args
    from sdpo.data.latents.prepare import prepare_cache
    from sdpo.data.loader import PairLoader
    from sdpo.data.source import open_pairs
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource

    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": TINY_MODEL,
        "train_data_dir": work / "pairs",
        "cache_dir": work / "datasets",
        "output_dir": work / "run",
        "train_batch_size": bench.batch,
        "resolution": bench.resolution // (2 if source == "cache" else 1),
        "dataloader_num_workers": min(workers, 1) if source == "streaming" else workers,
    }
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    argv += ["--streaming"] if source == "streaming" else []
    argv += ["--cache_dir_latents", str(work / "latents")] if source == "cache" else []
    args = parse_args(argv)
    pairs = open_pairs(args)
    cache = None
    if source == "cache":
        family = get_family(sdxl=False)
        cache = prepare_cache(pairs, args, family, ModelSource.from_args(args), Accelerator())
    return iter(PairLoader(pairs, args, rank=0, world_size=1, cache=cache))


def measure(bench: argparse.Namespace, work: Path, workers: int) -> dict[str, list[float]]:
    """Pairs per second of every turn of every source."""
    loaders = {source: open_loader(bench, work, source, workers) for source in SOURCES}
    for loader in loaders.values():
        next(loader)  # the first batch opens files and starts workers
    found: dict[str, list[float]] = {source: [] for source in SOURCES}
    for turn in range(bench.turns):
        for source in reversed(SOURCES) if turn % 2 else SOURCES:
            began = time.perf_counter()
            for _ in range(bench.batches):
                next(loaders[source])
            found[source].append(bench.batch * bench.batches / (time.perf_counter() - began))
    return found


def main() -> int:
    """Run, print, write."""
    bench = parse()
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    work = Path(tempfile.mkdtemp(prefix="sdpo-bench-"))
    try:
        stored = {"parquet": write_rows(work / "pairs", bench.rows, bench.resolution)}
        found = {workers: measure(bench, work, workers) for workers in bench.workers}
        stored["cache"] = _bytes_of(work / "latents")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    stored["streaming"] = stored["parquet"]
    rows, results = [], []
    for workers, rates in found.items():
        for source in SOURCES:
            rate, ratio = spread(rates[source]), ratios(rates[source], rates["parquet"])
            kib = stored[source] / bench.rows / 1024
            quartiles = f"{rate['quartile_1']:.0f}-{rate['quartile_3']:.0f}"
            cells = [f"{ratio['median']:.2f}", f"{rate['median']:.0f}", quartiles, f"{kib:.0f}"]
            rows.append([source, workers, *cells])
            about = {"source": source, "workers": workers, "kib_per_pair_on_disk": kib}
            results.append({**about, "pairs_per_s": rate, "to_parquet": ratio})
    print_table(
        ["source", "workers", "x parquet", "pairs/s", "quartiles", "KiB a pair on disk"], rows
    )
    names = ("resolution", "rows", "batch", "batches", "turns")
    settings = {name: getattr(bench, name) for name in names}
    write_result(bench.out, "data.py", {"settings": settings, "sources": results})
    return 0


if __name__ == "__main__":
    run_main(main, "data.py")

"""Pairs per second that one process's data loader gives: Parquet, streaming and the latent cache.

    bash scripts/bench/data.sh [--resolution 512] [--rows 256] [--workers 0 2]

Pairs are drawn scenes, enlarged to --resolution, with noise, as JPEG in Parquet shards. The
loaders are train.py's own and take turns of --batches batches each. The cache holds latents of the
size that SD1.5's VAE makes at --resolution: the tiny model's VAE shrinks by 4 instead of 8, so it
encodes at half of it. Its text embeddings are the tiny model's (24 x 64 instead of 77 x 768); the
bytes that a pair takes are in the table. Pages read twice come from memory, in every variant.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import common
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, flat, multiple_of, parse
from sdpo.config import parse_train

if TYPE_CHECKING:
    from sdpo.data.loader import PairLoader

SOURCES = ("parquet", "streaming", "cache")
SHARDS = 4
ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    resolution: int = flag(
        512, "side of the images", metavar="PX", check=(multiple_of(16), at_least(16))
    )
    rows: int = flag(128, "pairs in the data", check=ONE)
    batch: int = flag(8, "pairs a batch", metavar="PAIRS", check=ONE)
    batches: int = flag(4, "batches of a turn", check=ONE)
    turns: int = flag(8, "turns of each source", check=ONE)
    workers: tuple[int, ...] = flag(
        (0,), "data workers", shown="0", check=at_least(0), record=False
    )
    out: Path = flag(Path("output/bench/data.json"), "the figures", record=False)


def write_rows(directory: Path, rows: int, side: int) -> int:
    """Write pairs whose images are JPEG, `side` pixels square; returns the bytes on disk."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from sdpo.tinyworld.pairs import build_pairs

    rng = np.random.default_rng(0)

    def enlarged(data: bytes) -> bytes:
        buffer = io.BytesIO()
        common.grainy(Image.open(io.BytesIO(data)), side, rng).save(buffer, "JPEG", quality=90)
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
    return bytes_of(directory)


def bytes_of(directory: Path) -> int:
    """Add up the files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def open_loader(options: Options, work: Path, source: str, workers: int) -> PairLoader:
    """Build train.py's loader of one kind; the cache is made by the first that asks."""
    from sdpo.data.source import open_pairs
    from sdpo.models import open_base
    from sdpo.training.build import build_loader
    from sdpo.training.run import Run

    cached, streaming = source == "cache", source == "streaming"
    flags = common.run_flags(
        work,
        "run",
        train_batch_size=options.batch,
        resolution=options.resolution // (2 if cached else 1),
        dataloader_num_workers=min(workers, 1) if streaming else workers,
        streaming=streaming,
        cache_dir_latents=work / "latents" if cached else None,
    )
    config = parse_train(as_argv(flags))
    pairs = open_pairs(config.data, config.run.seed)
    return build_loader(config, open_base(config), pairs, Run(config))


def measure(options: Options, work: Path, workers: int) -> dict[str, list[float]]:
    """Take the pairs per second of every turn of every source."""
    loaders = {name: iter(open_loader(options, work, name, workers)) for name in SOURCES}
    for loader in loaders.values():
        next(loader)  # the first batch opens files and starts workers

    def rate(source: str) -> float:
        batches = range(options.batches)
        seconds = common.seconds_of(lambda: [next(loaders[source]) for _ in batches])
        return options.batch * options.batches / seconds

    return common.take_turns({name: partial(rate, name) for name in SOURCES}, options.turns)


def main() -> int:
    """Run, print, write."""
    options = parse(Options, sys.argv[1:], "data.py", __doc__)
    common.check_out(options.out)
    least = SHARDS * options.batch
    if options.rows < least:
        raise UserError(f"--rows must be at least {least}, {SHARDS} shards of a batch")
    with common.scratch() as work:
        parquet = write_rows(work / "pairs", options.rows, options.resolution)
        found = {workers: measure(options, work, workers) for workers in options.workers}
        stored = {"parquet": parquet, "streaming": parquet, "cache": bytes_of(work / "latents")}
    rows: list[list[Any]] = []
    results = []
    for workers, rates in found.items():
        for source in SOURCES:
            rate, ratio = (
                common.spread(rates[source]),
                common.ratios(rates[source], rates["parquet"]),
            )
            kib = stored[source] / options.rows / 1024
            cells = [
                f"{ratio['median']:.2f}",
                f"{rate['median']:.0f}",
                common.quartiles(rate, ".0f"),
            ]
            rows.append([source, workers, *cells, f"{kib:.0f}"])
            about = {"source": source, "workers": workers, "kib_per_pair_on_disk": kib}
            results.append({**about, "pairs_per_s": rate, "to_parquet": ratio})
    head = ["source", "workers", "x parquet", "pairs/s", "quartiles", "KiB a pair on disk"]
    common.print_table(head, rows)
    common.write_result(options.out, "data.py", {"settings": flat(options), "sources": results})
    return 0


if __name__ == "__main__":
    run_main(main, "data.py")

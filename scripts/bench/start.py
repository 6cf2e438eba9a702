"""A run's start: its phases up to the first step, and how what it does at the start grows.

    bash scripts/bench/start.sh [--rows 10000 100000 1000000] [--steps 10000 100000 1000000]
                                [--pairs 500 5000]

The phases are of the tiny model on 64 pairs in a fresh process, and of the recipe's script whole.
Growth is of rows of 64 random bytes an image: opening and choosing them for the first time
(datasets converts them) and again, describing them for the checkpoint, drawing an epoch's order,
going on 90 % through an epoch, by row and by stream (before and after its files are counted, see
sdpo/data/stream_rows.py); and of taking metrics.jsonl up again after so many steps. Last, the
comparison of two models on so many pairs, and its page in a browser.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench import common, report
from scripts.bench.browser import NEEDED, start_browser
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, parse

PHASES = "phases"  # the argument that makes this program the process that is measured
ENTRY = {"loss": 0.69, "loser_scale_histogram": [1.0] * 20}


@dataclass(frozen=True)
class Options:
    """The program's flags."""

    rows: tuple[int, ...] = flag(
        (10_000, 100_000, 1_000_000),
        "rows of the data",
        metavar="N",
        check=at_least(100),
        shown="10000 100000 1000000",
    )
    steps: tuple[int, ...] = flag(
        (10_000, 100_000, 1_000_000),
        "lines of metrics.jsonl",
        metavar="N",
        check=at_least(1),
        shown="10000 100000 1000000",
    )
    pairs: tuple[int, ...] = flag(
        (500, 5000), "pairs of a comparison", metavar="N", check=at_least(1), shown="500 5000"
    )
    out: Path = flag(Path("output/bench/start.json"), "the figures", record=False)


def phases(argv: list[str]) -> dict[str, float]:
    """Start a run as train.py does, and time each phase, seconds."""
    found: dict[str, float] = {}
    last = time.perf_counter()

    def mark(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        found[name], last = now - last, now

    from sdpo.config import parse_train
    from sdpo.training.places import check_places

    config = check_places(parse_train(argv))
    mark("flags and places")
    import torch  # noqa: F401

    mark("import torch")
    from scripts.bench.training import own_step
    from sdpo.data.source import open_pairs
    from sdpo.models import open_base
    from sdpo.training.build import build_loader, build_models
    from sdpo.training.run import Run
    from sdpo.training.update import Update

    mark("import the rest")
    run, base = Run(config), open_base(config)
    mark("accelerate, the base's files")
    pairs = open_pairs(config.data, config.run.seed)
    loader = build_loader(config, base, pairs, run)
    mark("pairs")
    models = build_models(config, base, loader, run)
    mark("models")
    run.begin(models, loader, Update(config, models, loader.max_train_steps, run))
    mark("optimizer, logs")
    steps, take = run.steps(), own_step(run)
    for name in ("first step", "second step"):
        step = next(steps)
        take(step)
        run.after(step)
        mark(name)
    return found


def time_start(work: Path) -> dict[str, float]:
    """Time the phases in a fresh process, and the recipe's script up to the end of its check."""
    from sdpo.tinyworld.pairs import write_pairs

    write_pairs(work / "pairs", 64, 8, 0)
    flags = as_argv(common.run_flags(work, "run", train_batch_size=8))
    program = [sys.executable, "-m", "scripts.bench.start", PHASES, *flags]
    done = subprocess.run(program, cwd=common.ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    script = ["bash", "scripts/train/sd15_diffusion_dpo.sh", *flags]
    environment = {**os.environ, "SDPO_SKIP_INSTALL": "1", "SDPO_PYTHON": sys.executable}
    check = partial(
        subprocess.run,
        [*script, "--check_only"],
        cwd=common.ROOT,
        check=True,
        capture_output=True,
        env=environment,
    )
    return {
        "script: flags and places": common.seconds_of(check),
        **found,
        "the script, to its first step": _seconds_to_first_step(work, script, environment),
    }


def _seconds_to_first_step(work: Path, script: list[str], environment: dict[str, str]) -> float:
    """Time a recipe's script until the first line of metrics.jsonl is there; the run ends then."""
    from sdpo.training.runlog import METRICS_FILE

    out, began = work / "first", time.perf_counter()
    as_phases = {"resolution": 64, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    argv = [*script, *as_argv({"output_dir": out, "max_train_steps": 1, **as_phases})]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        argv, cwd=common.ROOT, env=environment, stdout=quiet, stderr=quiet
    ) as run:
        log = out / METRICS_FILE
        while not (log.is_file() and log.stat().st_size):
            if run.poll() is not None:
                raise UserError(f"{shlex.join(argv)} ended with exit code {run.returncode}")
            time.sleep(0.01)
        return time.perf_counter() - began


def write_rows(path: Path, count: int) -> None:
    """Write pairs whose images are 64 random bytes, in files of 100,000."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir()
    rng = np.random.default_rng(0)
    for first in range(0, count, 100_000):
        n = min(100_000, count - first)
        images = {
            name: pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(64), n, [None, pa.py_buffer(rng.bytes(64 * n))]
            ).cast(pa.binary())
            for name in ("jpg_0", "jpg_1")
        }
        captions = [f"caption number {first + i}" for i in range(n)]
        labels = rng.choice([0.0, 0.5, 1.0], n, p=[0.45, 0.1, 0.45])
        table = pa.table({**images, "label_0": labels, "caption": captions})
        pq.write_table(table, path / f"train-{first:08d}.parquet")


def time_rows(work: Path, count: int) -> dict[str, float]:
    """Time what is done to `count` rows, seconds."""
    from sdpo.config import parse_train
    from sdpo.data.digest import describe_pairs
    from sdpo.data.loader import PairLoader, order_of
    from sdpo.data.order import Place
    from sdpo.data.source import open_pairs

    write_rows(work / "rows", count)
    flags = {"train_data_dir": work / "rows", "cache_dir": work / "cache", "resolution": 64}
    config = parse_train(as_argv(common.run_flags(work, "run", **flags)))
    streaming = parse_train(as_argv(common.run_flags(work, "run", **flags, streaming=True)))
    place = Place(0, int(0.8 * count))  # nine of ten rows are decided

    def stream() -> Iterator[Any]:
        loader = PairLoader(open_pairs(streaming.data, 0), streaming, 0, 1, place)
        rows: Any = loader._loader.dataset
        pairs: Iterator[Any] = rows._pairs_of(*place)  # undecoded, for they are no images
        next(pairs)
        return pairs

    def order() -> None:
        order_of(source, 0, 1).row(Place(1, 0))

    def going_on() -> None:
        pairs = order_of(source, 0, 1)
        source.row(pairs.row(next(pairs.steps(place))))

    def opened() -> Any:
        return open_pairs(config.data, 0)

    found = {"open, first time": common.seconds_of(opened)}
    found["open again"] = common.seconds_of(opened)
    source = opened()
    tasks: dict[str, Callable[[], Any]] = {
        "describe": lambda: describe_pairs(source),
        "an epoch's order": order,
        "go on by row": going_on,
        "go on by stream, no file counted yet": stream,
    }
    Path(streaming.run.output_dir).mkdir()
    found |= {name: common.seconds_of(task) for name, task in tasks.items()}
    for _ in stream():  # to the end, as a run does, which counts the pairs of its files
        pass
    return {**found, "go on by stream": common.seconds_of(stream)}


def time_metrics(work: Path, count: int) -> float:
    """Time taking up metrics.jsonl of `count` steps, seconds."""
    from sdpo.training.runlog import METRICS_FILE, RunLog

    work.mkdir()
    bins = {"by_timestep": {"winner_drift": [0.1] * 10, "loser_scale": [0.5] * 10}}
    entry = {**ENTRY, **bins, **{f"metric_{i}": 0.123456789 for i in range(20)}}
    rest = json.dumps(entry)[1:]
    with open(work / METRICS_FILE, "w") as file:
        file.writelines(f'{{"step": {i + 1}, {rest}\n' for i in range(count))
    return common.seconds_of(lambda: RunLog(work, count).close())


def time_reports(work: Path, counts: Sequence[int]) -> dict[int, dict[str, float]]:
    """Time the comparison of two models on so many pairs, and its page where there is a browser."""
    found = {count: report.time_compare(work / f"pairs-{count}", count) for count in counts}
    browser = start_browser(work / "profile")
    if browser is None:
        print(f"the page is not opened: that needs {NEEDED}")
        return found
    try:
        for count in counts:
            found[count] |= report.time_page(browser, work / f"pairs-{count}" / report.PAGE)
    finally:
        browser.quit()
    return found


def _print_growth(of: str, found: dict[int, dict[str, float]]) -> None:
    names = list(next(iter(found.values())))
    cells = [[n, *(f"{found[count][n]:.2f}" for count in found)] for n in names]
    print()
    common.print_table(["s", *(f"{count:,} {of}" for count in found)], cells)


def main() -> int:
    """Time, print, write; or be the process whose phases are timed."""
    if sys.argv[1:2] == [PHASES]:
        print(json.dumps(phases(sys.argv[2:])))
        return 0
    options = parse(Options, sys.argv[1:], "start.py", __doc__)
    common.check_out(options.out)
    with common.scratch() as work:
        start = time_start(work)
        common.print_table(["phase", "s"], [[k, f"{v:.2f}"] for k, v in start.items()])
        rows = {}
        for count in options.rows:
            (work / str(count)).mkdir()
            rows[count] = time_rows(work / str(count), count)
        _print_growth("rows", rows)
        steps = {n: time_metrics(work / f"steps-{n}", n) for n in options.steps}
        taken_up = {n: {"metrics.jsonl taken up": seconds} for n, seconds in steps.items()}
        _print_growth("steps", taken_up)
        reports = time_reports(work, options.pairs)
        _print_growth("pairs", reports)
    result = {"phases": start, "rows": rows, "metrics_steps": steps, "reports": reports}
    common.write_result(options.out, "start.py", result)
    return 0


if __name__ == "__main__":
    run_main(main, "start.py")

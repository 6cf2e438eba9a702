"""Five scorers in one pass of eval/score.py, against one process for each scorer.

    bash scripts/bench/score.sh [--images 64] [--resolution 512] [--weights NAME=PATH ...]

Without --weights the scorers have small random weights in the published layout (scripts/parity), so
that decoding and preparing images and starting processes weigh more than they do beside the true
models: the counts carry over, the ratio of the times is that of the part which is shared. The
images are drawn scenes, enlarged, with noise, as PNG. Both ways take turns, forwards and backwards,
and start from a manifest without scores each time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench import common
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, flat, parse
from sdpo.evaluation.score.scorers import PUBLISHED

ONE_PASS, APART = "one pass", "one process each"
ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    images: int = flag(64, "images to score", metavar="N", check=ONE)
    resolution: int = flag(512, "their side", metavar="PX", check=ONE)
    turns: int = flag(3, "turns of each way", check=ONE)
    scorers: tuple[str, ...] = flag(tuple(PUBLISHED), "which", metavar="NAME", shown="all five")
    weights: tuple[str, ...] = flag((), "as of eval/score.py", metavar="NAME=PATH", record=False)
    out: Path = flag(Path("output/bench/score.json"), "the figures", record=False)


def write_images(path: Path, count: int, side: int) -> None:
    """Write a manifest of `count` images, `side` pixels square, and the images."""
    import numpy as np

    from sdpo.evaluation.generate.manifest import write_manifest
    from sdpo.tinyworld import world

    rng = np.random.default_rng(0)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    rows: list[Any] = []
    for i in range(count):
        scene = world.render(world.sample_scene(rng))
        name = f"{folder.name}/{i}_{side}x{side}.png"
        common.grainy(scene, side, rng).save(path.parent / name)
        rows.append((f"a scene of number {i}", name, {}))
    write_manifest(path, rows)


def write_weights(work: Path, scorers: Sequence[str]) -> list[str]:
    """Write small random weights of the published scorers among `scorers`, as --weights takes
    them."""
    from scripts.parity.small_scorers import WRITERS

    made = [WRITERS[name](work / name) for name in scorers if name in WRITERS]
    return [f"{name}={path}" for weights in made for name, path in weights.items()]


def run(manifest: Path, scorers: Sequence[str], weights: Sequence[str]) -> dict[str, Any]:
    """Score by a process of its own; returns its report, and the process's own time.

    Raises:
        UserError: it failed, with its last line.
    """
    mine = [w for w in weights if w.partition("=")[0].partition(".")[0] in scorers]
    argv = [manifest, "--outdir", manifest.parent / "summary", "--scorers", *scorers]
    argv += ["--weights", *mine] if mine else []
    command = [sys.executable, "-m", "scripts.bench.score_worker", *map(str, argv)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    wall = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"score.py failed: {done.stderr.strip().splitlines()[-1]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall": wall}


def score_all(
    manifest: Path, groups: Sequence[Sequence[str]], weights: Sequence[str]
) -> dict[str, Any]:
    """Score everything afresh, each group of scorers in a process; sums over the processes."""
    for path in manifest.parent.glob(f"{manifest.stem}_scores.*"):
        path.unlink()
    reports = [run(manifest, group, weights) for group in groups]
    return {key: sum(r[key] for r in reports) for key in ("decoded", "seconds", "wall")}


def main() -> int:
    """Run, print, write."""
    options = parse(Options, sys.argv[1:], "score.py", __doc__)
    common.check_out(options.out)
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    ways: dict[str, list[tuple[str, ...]]] = {
        ONE_PASS: [options.scorers],
        APART: [(name,) for name in options.scorers],
    }
    with common.scratch() as work:
        weights = options.weights or write_weights(work, options.scorers)
        side = options.resolution
        manifest = work / "images" / f"suite_seed0_{side}x{side}.json"
        write_images(manifest, options.images, side)
        tasks = {way: partial(score_all, manifest, groups, weights) for way, groups in ways.items()}
        found = common.take_turns(tasks, options.turns)
    rows, results = [], {}
    for way, reports in found.items():
        entry: dict[str, Any] = {"decoded": reports[0]["decoded"]}
        for key in ("wall", "seconds"):
            values = [r[key] for r in reports]
            entry[key] = common.spread(values)
            entry[f"{key}_to_apart"] = common.ratios(values, [r[key] for r in found[APART]])
        results[way] = entry
        cells = [f"{entry[k]['median']:.2f}" for k in ("wall_to_apart", "seconds_to_apart")]
        cells += [f"{entry[k]['median']:.1f}" for k in ("wall", "seconds")]
        rows.append([way, *cells, entry["decoded"]])
    head = ["way", "wall/apart", "work/apart", "wall s", "work s", "images decoded"]
    common.print_table(head, rows)
    common.write_result(options.out, "score.py", {"settings": flat(options), "ways": results})
    return 0


if __name__ == "__main__":
    run_main(main, "score.py")

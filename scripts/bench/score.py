"""Five scorers in one pass of eval/score.py, against one process for each scorer.

    bash scripts/bench/score.sh [--images 64] [--resolution 512] [--weights NAME=PATH ...]

Without --weights the scorers have small random weights in the published layout (scripts/parity), so
that decoding and preparing images and starting processes weigh more than they do beside the true
models: the counts carry over, the ratio of the times is that of the part which is shared. The
images are drawn scenes, enlarged, with noise, as PNG. Both ways take turns, forwards and backwards,
and start from a manifest without scores each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.common import ROOT, parser, print_table, ratios, spread, write_result
from sdpo.common.cli import at_least
from sdpo.common.errors import UserError, run_main
from sdpo.evaluation.score.scorers import PUBLISHED

ONE_PASS, APART = "one pass", "one process each"


def parse() -> argparse.Namespace:
    """The benchmark's flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    found = parser("score.py", __doc__)
    add = found.add_argument
    add("--images", type=int, default=64, metavar="N", help="default: 64")
    add("--resolution", type=int, default=512, metavar="PX", help="default: 512")
    add("--turns", type=int, default=3, help="default: 3")
    add("--scorers", nargs="+", default=list(PUBLISHED), metavar="NAME", help="default: all five")
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help="as of eval/score.py")
    args = found.parse_args()
    at_least(args, 1, "images", "resolution", "turns")
    return args


def write_images(path: Path, count: int, side: int) -> None:
    """A manifest of `count` images."""
    import numpy as np
    from PIL import Image

    from sdpo.evaluation.generate.manifest import write_manifest
    from sdpo.tinyworld import world

    rng = np.random.default_rng(0)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        scene = world.render(world.sample_scene(rng))
        pixels = np.asarray(scene.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
        noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i}_{side}x{side}.png")
        rows.append((f"a scene of number {i}", f"{folder.name}/{i}_{side}x{side}.png", {}))
    write_manifest(path, rows)


def run(manifest: Path, scorers: list[str], weights: list[str]) -> dict[str, Any]:
    """eval/score.py in a process of its own; its report, and the process's own time.

    Raises:
        UserError: it failed, with its last line.
    """
    program = ROOT / "scripts/bench/score_worker.py"
    mine = [w for w in weights if w.partition("=")[0].partition(".")[0] in scorers]
    argv = [manifest, "--outdir", manifest.parent / "summary", "--scorers", *scorers]
    argv += ["--weights", *mine] if mine else []
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(program), *map(str, argv)], capture_output=True, text=True, cwd=ROOT
    )
    wall = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"score.py failed: {done.stderr.strip().splitlines()[-1]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall": wall}


def forget(manifest: Path) -> None:
    """Delete the scores beside a manifest."""
    for path in manifest.parent.glob(f"{manifest.stem}_scores.*"):
        path.unlink()


def turn(manifest: Path, way: str, args: argparse.Namespace) -> dict[str, Any]:
    """Score everything once in one of the ways; sums over its processes."""
    forget(manifest)
    groups = [args.scorers] if way == ONE_PASS else [[name] for name in args.scorers]
    reports = [run(manifest, group, args.weights) for group in groups]
    return {key: sum(r[key] for r in reports) for key in ("decoded", "seconds", "wall")}


def main() -> int:
    """Run, print, write."""
    args = parse()
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    work = Path(tempfile.mkdtemp(prefix="sdpo-bench-"))
    try:
        if not args.weights:
            from scripts.parity.small_scorers import WRITERS

            made: dict[str, str] = {}
            for name in args.scorers:
                made |= WRITERS[name](work / name) if name in WRITERS else {}
            args.weights = [f"{name}={path}" for name, path in made.items()]
        manifest = work / "images" / f"suite_seed0_{args.resolution}x{args.resolution}.json"
        write_images(manifest, args.images, args.resolution)
        found: dict[str, list[dict[str, Any]]] = {ONE_PASS: [], APART: []}
        for number in range(args.turns):
            for way in reversed(found) if number % 2 else found:
                found[way].append(turn(manifest, way, args))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows, results = [], {}
    for way, reports in found.items():
        entry: dict[str, Any] = {"decoded": reports[0]["decoded"]}
        for key in ("wall", "seconds"):
            values = [r[key] for r in reports]
            entry[key] = spread(values)
            entry[f"{key}_to_apart"] = ratios(values, [r[key] for r in found[APART]])
        results[way] = entry
        numbers = (entry[k]["median"] for k in ("wall_to_apart", "seconds_to_apart"))
        cells = [f"{n:.2f}" for n in numbers]
        cells += [f"{entry[k]['median']:.1f}" for k in ("wall", "seconds")]
        rows.append([way, *cells, entry["decoded"]])
    head = ["way", "wall/apart", "work/apart", "wall s", "work s", "images decoded"]
    print_table(head, rows)
    settings = {name: getattr(args, name) for name in ("images", "resolution", "turns", "scorers")}
    write_result(args.out, "score.py", {"settings": settings, "ways": results})
    return 0


if __name__ == "__main__":
    run_main(main, "score.py")

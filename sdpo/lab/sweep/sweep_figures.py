"""Which figures a sweep gets: those that fit what its file varied and measured."""

from __future__ import annotations

from pathlib import Path

from sdpo.lab.sweep.figures import draw_drift, draw_horizon, draw_map, draw_scale, draw_strips
from sdpo.lab.sweep.file import Sweep
from sdpo.lab.sweep.results import RESULTS_FILE, read_results
from sdpo.lab.sweep.stages import image_dirs, read_summary

MAP = ("beta_dpo", "winner_preserving_mu")


def draw(sweep: Sweep, out: Path) -> list[Path]:
    """Write them to OUT/figures; returns their paths, none where no run came to its end."""
    table = read_results(out / RESULTS_FILE)
    if not len(table):
        return []
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    by = sweep.groups
    drawn = [folder / "scale.png"]
    draw_scale(table, drawn[-1], by)
    if sweep.heldout is not None:
        drawn.append(folder / "drift.png")
        draw_drift(table, drawn[-1], by)
        if set(MAP) <= set(sweep.grid):
            for scorer in sweep.scorers if sweep.images else (None,):
                drawn.append(folder / (f"map_{scorer}.png" if scorer else "map.png"))
                draw_map(table, drawn[-1], *MAP, scorer=scorer)
    if sweep.images is not None and sweep.checkpoints == "all":
        drawn.append(folder / "horizon.png")
        draw_horizon(table, drawn[-1], sweep.scorers, by)
        strips = _manifests(sweep, out)
        if strips:
            drawn.append(folder / "strips.png")
            draw_strips(strips, drawn[-1])
    return drawn


def _manifests(sweep: Sweep, out: Path) -> dict[str, dict[int, Path]]:
    """The first suite's manifests by variant and step, of the first run of each variant."""
    found: dict[str, dict[int, Path]] = {}
    for run in sweep.runs:
        dirs = image_dirs(sweep, run, out)
        if run.variant in found or len(dirs) < 2:
            continue
        found[run.variant] = {
            step: manifest
            for step, directory in dirs.items()
            if read_summary(directory)
            for manifest in _first_manifest(directory)
        }
    return {variant: manifests for variant, manifests in found.items() if manifests}


def _first_manifest(directory: Path) -> list[Path]:
    folders = sorted(p for p in directory.iterdir() if p.is_dir())
    return [folder.with_name(f"{folder.name}.json") for folder in folders[:1]]

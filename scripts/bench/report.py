"""A comparison of two models with five scores an image: how long compare.py takes, and its page in
a browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench import common

SIDE = 512
CATEGORIES = 10
PAGE = "report.html"
# Sets a field as a user does, or chooses the next pair where it is none; tells the seconds until
# the frame that shows what follows is drawn.
_ACT = """
const [id, value, done] = arguments;
const field = document.getElementById(id);
const began = performance.now();
if (field.tagName === "BUTTON") field.click();
else {
  field.value = value;
  for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, {bubbles: true}));
}
requestAnimationFrame(() => setTimeout(() => done((performance.now() - began) / 1000)));
"""
_OPENED = """
const done = arguments[0];
const [visit] = performance.getEntriesByType("navigation");
new PerformanceObserver((list, observer) => {
  for (const paint of list.getEntriesByName("first-contentful-paint")) {
    observer.disconnect();
    done([paint.startTime, visit.domContentLoadedEventEnd].map((ms) => ms / 1000));
  }
}).observe({type: "paint", buffered: true});
"""
_ACTS = {
    "other metric": ("metric", "clip"),
    "sort": ("sort", "closest"),
    "filter": ("winner", "a"),
    "search": ("text", "number 1"),
    "next pair": ("next", ""),
}


def write_models(work: Path, count: int) -> dict[str, Path]:
    """Write two models' manifests of `count` images, which are all one PNG of 512 px, with five
    scores each; returns the manifests by label."""
    import numpy as np

    from sdpo.evaluation.generate.manifest import read_manifest, write_manifest
    from sdpo.evaluation.score.scorers import PUBLISHED
    from sdpo.evaluation.score.table import read_scores
    from sdpo.tinyworld import world

    rng = np.random.default_rng(0)
    work.mkdir()
    scene = world.render(world.sample_scene(rng))
    common.grainy(scene, SIDE, rng).save(work / "image.png")
    found = {}
    for label in ("first", "second"):
        found[label] = work / f"{label}.json"
        rows: list[Any] = [
            (
                f"a prompt of some length, of a scene in warm evening light, number {i}",
                "image.png",
                {"category": f"category {i % CATEGORIES}"},
            )
            for i in range(count)
        ]
        write_manifest(found[label], rows)
        table = read_scores(read_manifest(found[label]))
        for name in PUBLISHED:
            table.put(name, np.arange(count), rng.normal(size=count))
            table.about[name] = {"label": name, "weights": {}, "precision": "no"}
        table.save()
    return found


def time_compare(work: Path, count: int) -> dict[str, float]:
    """Time compare.py on `count` pairs in a process of its own, seconds, and what it does in this
    one, by part; with the size of its page, MB."""
    from sdpo.evaluation.compare.report import write_report
    from sdpo.evaluation.compare.results import Model, Study, compare_models
    from sdpo.evaluation.compare.run import write_two
    from sdpo.evaluation.generate.manifest import read_manifest
    from sdpo.evaluation.score.scorers import PUBLISHED
    from sdpo.evaluation.score.table import read_scores

    manifests = write_models(work, count)
    named = [f"{label}={path}" for label, path in manifests.items()]
    argv = [sys.executable, "-m", "sdpo.cli", "compare", "--outdir", str(work), "--json", *named]
    whole = common.seconds_of(
        lambda: subprocess.run(argv, cwd=common.ROOT, check=True, capture_output=True)
    )
    metrics, found = list(PUBLISHED), {"compare.py, whole": whole}
    models: list[Model] = []

    def read() -> None:
        models.extend(
            Model(label, read_scores(read_manifest(path))) for label, path in manifests.items()
        )

    found["read, tell images by content"] = common.seconds_of(read)
    studies: list[Study] = []

    def compare() -> None:
        comparison = compare_models(*models, metrics, "prompt", "half", 0)
        studies.append(Study(models, metrics, [comparison], []))

    found["align, resample"] = common.seconds_of(compare)
    study = studies[0]
    found["pair files"] = common.seconds_of(lambda: write_two(study.comparisons[0], [], work))
    page = work / PAGE
    found["page"] = common.seconds_of(lambda: write_report(page, study))
    return {**found, "page, MB": page.stat().st_size / 1e6}


def time_page(driver: Any, page: Path) -> dict[str, float]:
    """Time a page in a browser, seconds: until it is first drawn, until it can be used, and until
    what a user does shows."""
    driver.get(page.as_uri())
    drawn, usable = driver.execute_async_script(_OPENED)
    found = {"browser: first drawn": drawn, "browser: usable": usable}
    for name, act in _ACTS.items():
        found[f"browser: {name}"] = driver.execute_async_script(_ACT, *act)
    return found

"""Time images of an evaluation: one prompt at a time, as the published script makes them, against
several at once by diffusers' pipeline and by the protocol `paper`.

    bash scripts/bench/generate.sh [--base DIR | --size sd15] [--prompts 8] [--batch_size 8]

All make the same number of images by the same number of sampling steps, both halves of the guidance
in one forward pass, and take turns, forwards and backwards. `--size` writes a base of the true size
with random weights first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench import common
from sdpo.common.errors import run_main
from sdpo.common.flags import at_least, flag, flat, parse
from sdpo.common.precision import DTYPES

ONE_BY_ONE, PIPELINE, PAPER = "one by one", "pipeline", "paper"
WAYS = (ONE_BY_ONE, PIPELINE, PAPER)
ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    base: Path = flag(common.TINY_MODEL, "base in diffusers layout", metavar="DIR")
    size: str | None = flag(
        None, "instead, one of its true size", choices=("sd15", "sdxl"), shown="none"
    )
    ways: tuple[str, ...] = flag(WAYS, "which", choices=WAYS, shown="all three")
    prompts: int = flag(8, "images of a turn", metavar="N", check=ONE)
    batch_size: int = flag(8, "images at a time, but for one by one", metavar="N", check=ONE)
    resolution: int = flag(64, "their side", metavar="PX", check=at_least(8))
    steps: int = flag(10, "sampling steps", metavar="N", check=ONE)
    dtype: str = flag("fp32", "the models' number format", choices=("fp32", "fp16", "bf16"))
    turns: int = flag(5, "turns of each way", check=ONE)
    out: Path = flag(Path("output/bench/generate.json"), "the figures", record=False)


def tasks_of(options: Options, base: Path) -> dict[str, Callable[[], None]]:
    """Load the base once; returns what makes a turn's images, by way."""
    from sdpo.common.processes import start
    from sdpo.config.rules import check_resolution
    from sdpo.evaluation.generate.protocols import PROTOCOLS, Sampling
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.locations import find_family, reader_of

    name, _ = find_family(reader_of(str(base), None, None), "--base")
    family, source = get_family(name), ModelSource(str(base))
    check_resolution(options.resolution, family.facts)
    unet, frozen = family.load_unet(source), family.load_frozen(source)
    dtype, device = DTYPES[options.dtype], start().device
    sampling = Sampling(options.steps, family.facts.guidance, 0, options.resolution, dtype)
    # The last one says in which format the VAE computes, for both.
    made = {
        protocol: PROTOCOLS[protocol](family, unet, frozen, source, sampling, device)
        for protocol in ("paper", "diffusers")
    }
    how = {ONE_BY_ONE: ("diffusers", 1), PIPELINE: ("diffusers", options.batch_size)}
    how[PAPER] = ("paper", options.batch_size)
    prompts = [f"a red circle and {i} blue squares" for i in range(options.prompts)]

    wait = common.waiting_for(device)

    def task(way: str) -> Callable[[], None]:
        protocol, at_once = how[way]

        def make() -> None:
            for first in range(0, len(prompts), at_once):
                indices = range(first, min(first + at_once, len(prompts)))
                made[protocol]([prompts[i] for i in indices], indices)
            wait()

        return make

    return {way: task(way) for way in options.ways}


def measure(options: Options, base: Path) -> dict[str, Any]:
    """Take turns; returns seconds an image and ratios to one by one, by way."""
    tasks = tasks_of(options, base)
    for task in tasks.values():
        task()
    seconds = common.take_turns(
        {way: lambda task=task: common.seconds_of(task) for way, task in tasks.items()},  # type: ignore[misc]
        options.turns,
    )
    return {
        way: {
            "seconds_an_image": common.spread([s / options.prompts for s in found]),
            "to_one_by_one": common.ratios(found, seconds[ONE_BY_ONE])
            if ONE_BY_ONE in seconds
            else None,
        }
        for way, found in seconds.items()
    }


def main() -> int:
    """Measure, print the table and write the figures."""
    options = parse(Options, sys.argv[1:], "generate.py", __doc__)
    common.check_out(options.out)
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    with common.scratch() as work:
        base = options.base
        if options.size:
            from scripts.bench.true_size import write_pipeline_apart

            base = work / options.size
            write_pipeline_apart(options.size, base)
        found = measure(options, base)
    common.print_table(
        ("way", "time / one by one", "quartiles", "seconds an image"),
        [
            (
                way,
                f"{of['to_one_by_one']['median']:.2f}" if of["to_one_by_one"] else "",
                common.quartiles(of["to_one_by_one"], ".2f") if of["to_one_by_one"] else "",
                f"{of['seconds_an_image']['median']:.3f}",
            )
            for way, of in found.items()
        ],
    )
    common.write_result(options.out, "generate.py", {"settings": flat(options), "ways": found})
    return 0


if __name__ == "__main__":
    run_main(main, "generate.py")

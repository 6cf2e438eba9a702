"""Time a training step on the losers of one pair in N, and measure the variance that this adds.

    bash scripts/bench/losers.sh [--base DIR] [--one_in 2 4] [--pairs 8]

A step is noising, reference, UNet, safeguard per pair, backward pass and fused AdamW, on pairs of
the tiny world; the settings take turns. Variance: the mean squared distance between a batch's
gradients with drawn losers and with all, over --batches batches, as a share of the variance of the
gradients with all between batches.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import common
from sdpo.common.cli import as_argv
from sdpo.common.errors import run_main
from sdpo.common.flags import ABOVE_ZERO, at_least, flag, flat, parse

if TYPE_CHECKING:
    from torch import Tensor

    from sdpo.data.pairs import Batch
    from sdpo.lab.audit.measure import Subject

ONE = at_least(1)


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    base: Path = flag(common.TINY_MODEL, "base in diffusers layout", metavar="DIR")
    checkpoint: Path | None = flag(
        None, "weights to look at: unet.pth of a run from the base", metavar="FILE", shown="its own"
    )
    one_in: tuple[int, ...] = flag((2, 4), "values of N", metavar="N", check=ONE, shown="2 4")
    pairs: int = flag(8, "pairs a step", check=ONE)
    resolution: int = flag(64, "their side", metavar="PX", check=at_least(8))
    beta_dpo: float = flag(2000.0, "strength of the KL constraint", check=ABOVE_ZERO)
    turns: int = flag(12, "timed steps of each", check=ONE)
    batches: int = flag(32, "for the variance", check=at_least(2))
    out: Path = flag(Path("output/bench/losers.json"), "the figures", record=False)


def load_subject(options: Options, work: Path) -> Subject:
    """Write pairs and load base, reference and data."""
    from sdpo.lab.audit.config import parse_config
    from sdpo.lab.audit.measure import load
    from sdpo.tinyworld.pairs import ensure_pairs

    count = options.pairs * (options.batches + 1)
    ensure_pairs(work / "pairs", 2 * count, 1, seed=0, progress=False)
    flags = common.run_flags(work, "run", pretrained_model_name_or_path=options.base)
    flags["checkpoint"] = options.checkpoint
    flags |= {"train_batch_size": options.pairs, "resolution": options.resolution}
    return load(parse_config(as_argv(flags)))


def loss_of(subject: Subject, batch: Batch, one_in: int, beta: float) -> Tensor:
    """Take the safeguarded loss of a batch's pairs, of one loser in `one_in`."""
    import torch

    from sdpo.losses.preference import preference_loss
    from sdpo.models.forward import drawn_losers, predict

    family, inputs = subject.network.family, subject.noised(batch)
    with torch.no_grad():
        reference = predict(family, subject.models.reference, inputs)
    drawn = None if one_in == 1 else drawn_losers(batch.keys, one_in)
    prediction = predict(family, subject.models.unet, inputs, drawn)
    weights = None if drawn is None else (one_in * drawn).to(prediction.device)
    return preference_loss(
        "diffusion-dpo",
        prediction,
        reference,
        inputs.target,
        beta=beta,
        mu=0.9,
        scope="pair",
        loser_weights=weights,
    ).loss


def added_variance(subject: Subject, options: Options) -> dict[int, float]:
    """Compute the variance that drawing adds, as a share of that between batches, by N."""
    import torch

    parameters = subject.models.trainable

    def gradient(batch: Batch, one_in: int) -> Tensor:
        found = torch.autograd.grad(
            loss_of(subject, batch, one_in, options.beta_dpo), parameters, allow_unused=True
        )
        return torch.cat([g.flatten() for g in found if g is not None])

    batches = list(islice(subject.loader, options.batches))
    whole = torch.stack([gradient(batch, 1) for batch in batches])
    between = (whole - whole.mean(0)).square().sum().item() / (len(batches) - 1)
    found = {}
    for one_in in options.one_in:
        pairs = zip(batches, whole, strict=True)
        distances = [(gradient(b, one_in) - g).square().sum().item() for b, g in pairs]
        found[one_in] = sum(distances) / len(distances) / between
    return found


def timed(subject: Subject, options: Options) -> dict[int, list[float]]:
    """Time steps in turns, seconds by N; 1 stands for all losers."""
    import torch

    batch = next(iter(subject.loader))
    optimizer = torch.optim.AdamW(subject.models.trainable, lr=1e-8, fused=True)

    def step(one_in: int) -> None:
        loss_of(subject, batch, one_in, options.beta_dpo).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    wait = common.waiting_for(subject.models.encoder.device)
    settings: Sequence[int] = (1, *options.one_in)
    for one_in in settings:
        step(one_in)
    tasks = {n: partial(common.seconds_of, partial(step, n), wait) for n in settings}
    return common.take_turns(tasks, options.turns)


def main() -> int:
    """Measure, print, write."""
    options = parse(Options, sys.argv[1:], "losers.py", __doc__)
    common.check_out(options.out)
    from sdpo.common.processes import quieten_libraries

    quieten_libraries()
    with common.scratch() as work:
        subject = load_subject(options, work)
        variance = added_variance(subject, options)
        seconds = timed(subject, options)
    found: dict[str, Any] = {
        str(n): {
            "to_all": common.ratios(values, seconds[1]),
            "seconds": common.spread(values),
            "added_variance": variance.get(n, 0.0),
        }
        for n, values in seconds.items()
    }
    rows = [
        [
            n,
            f"{of['to_all']['median']:.2f}",
            common.quartiles(of["to_all"], ".2f"),
            f"{of['seconds']['median']:.3f}",
            f"{of['added_variance']:.2f}",
        ]
        for n, of in found.items()
    ]
    head = ["losers, one in", "time / all", "quartiles", "seconds", "added variance / batch's"]
    common.print_table(head, rows)
    common.write_result(options.out, "losers.py", {"settings": flat(options), "one_in": found})
    return 0


if __name__ == "__main__":
    run_main(main, "losers.py")

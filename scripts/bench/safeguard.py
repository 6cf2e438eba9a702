"""The safeguard's cost, both scopes: alone, on top of a loss, and as a share of a step.

    bash scripts/bench/safeguard.sh [--shapes 1x64 8x64 8x128] [--step_json output/bench/step.json]

For every shape (pairs x side of the latents, four channels) are timed in turns: the loss with its
backward pass to the predictions without the safeguard, the same in either scope, and the tiny
model's UNet step on latents of that size (forward, reference and backward; left out above
--largest_step), and the rule alone. Medians and quartiles; the overhead is the median over turns of
the difference, so that drift cancels. Where the loss itself is large, that difference drowns in its
scatter; shares are therefore of the rule alone, which takes longer than it adds. A share of a true
step comes from step.py's file, by --step_json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import common
from sdpo.common.errors import UserError, run_main
from sdpo.common.flags import at_least, flag, parse
from sdpo.config import MethodConfig

if TYPE_CHECKING:
    import torch

Task = Callable[[], None]
SCOPES = ("batch", "pair")
# SD1.5 at 256 and 512 px, SDXL at 1024, one pair and the recipes' eight; the tiny model's.
SHAPES = ("8x16", "1x32", "1x64", "8x64", "1x128", "8x128")


@dataclass(frozen=True)
class Options:
    """The benchmark's flags."""

    shapes: tuple[str, ...] = flag(SHAPES, "what is timed", metavar="PAIRSxSIDE")
    repeats: int = flag(200, "turns of each shape", check=at_least(2))
    method: str = flag("diffusion-dpo", "the loss")
    device: str = flag("cpu", "where it is computed")
    largest_step: int = flag(16, "side up to which the tiny step is timed", metavar="SIDE")
    step_repeats: int = flag(10, "turns of the tiny step", check=at_least(2))
    step_json: Path | None = flag(None, "what step.py wrote", metavar="FILE.json")
    out: Path = flag(Path("output/bench/safeguard.json"), "the figures", record=False)


def parse_shape(text: str) -> tuple[int, int]:
    """Take PAIRSxSIDE apart.

    Raises:
        UserError: it is something else.
    """
    pairs, _, side = text.partition("x")
    if not (pairs.isdigit() and side.isdigit() and int(pairs) and int(side)):
        raise UserError(f"--shapes: {text} is not PAIRSxSIDE, such as 8x64")
    return int(pairs), int(side)


def loss_tasks(method: str, pairs: int, side: int, device: torch.device) -> dict[str, Task]:
    """Make the tasks of one shape: the loss and its backward pass to the predictions, plain and in
    either scope; and the rule alone."""
    import torch

    from sdpo import loser_scale, preference_loss, scale_gradient

    draw = torch.Generator().manual_seed(0)
    shape = (3, 2 * pairs, 4, side, side)
    prediction, reference, target = torch.randn(shape, generator=draw).to(device)
    prediction = prediction.clone().requires_grad_()
    error = torch.ones(pairs, device=device, requires_grad=True)
    options = MethodConfig(train_method=method).options("sd15")

    def loss(mu: float | None, scope: Any) -> None:
        prediction.grad = None
        preference_loss(
            method, prediction, reference, target, beta=5000.0, mu=mu, scope=scope, **options
        ).loss.backward()

    def rule(scope: Any) -> None:
        error.grad = None
        winner, loser = (prediction.detach() - target).chunk(2)
        scale_gradient(error, loser_scale(winner, loser, 0.9, scope)).sum().backward()

    return {
        "plain": partial(loss, None, "batch"),
        **{scope: partial(loss, 0.9, scope) for scope in SCOPES},
        **{f"rule {scope}": partial(rule, scope) for scope in SCOPES},
    }


def tiny_step(pairs: int, side: int, device: torch.device) -> Task:
    """Make the tiny model's forward, reference and backward pass, without data, encoders and
    optimizer."""
    import torch

    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.forward import NoisedPairs, predict, predict_reference
    from sdpo.models.reference import make_reference

    family = get_family("sd15")
    unet: Any = family.load_unet(ModelSource(str(common.TINY_MODEL))).to(device)
    reference = make_reference(unet, torch.float32)
    noisy = torch.randn(2 * pairs, 4, side, side, device=device)
    timesteps = torch.full((2 * pairs,), 500, device=device)
    hidden = torch.randn(2 * pairs, 24, unet.config.cross_attention_dim, device=device)
    inputs = NoisedPairs(noisy, timesteps, noisy, {"hidden": hidden})

    def step() -> None:
        predict_reference(family, reference, inputs, nullcontext())
        predict(family, unet, inputs).square().mean().backward()

    return step


def time_in_turns(
    tasks: Mapping[str, Task], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time every task `repeats` times in turn, seconds; a first call of each is not counted."""

    wait = common.waiting_for(device)
    for task in tasks.values():
        task()
    timed = {name: partial(common.seconds_of, task, wait) for name, task in tasks.items()}
    return common.take_turns(timed, repeats)


def measure(options: Options, pairs: int, side: int) -> dict[str, Any]:
    """Take one shape's figures."""
    import torch

    device = torch.device(options.device)
    tasks = loss_tasks(options.method, pairs, side, device)
    seconds = time_in_turns(tasks, options.repeats, device)
    plain, steps = seconds["plain"], {}
    if side <= options.largest_step:
        task = {"tiny": tiny_step(pairs, side, device)}
        steps["tiny"] = common.spread(time_in_turns(task, options.step_repeats, device)["tiny"])
    if options.step_json:
        found = json.loads(options.step_json.read_text(encoding="utf-8"))
        settings, variants = found["settings"], found["variants"]
        # A VAE makes an image's side 4 (the tiny ones) or 8 times smaller.
        if settings["batch"] == pairs and settings["resolution"] in (4 * side, 8 * side):
            whole = variants.get("no_safeguard") or variants["plain"]
            steps[f"step.py {settings['base']}"] = whole["seconds"]
    rules = {scope: common.spread(seconds[f"rule {scope}"]) for scope in SCOPES}
    return {
        "pairs": pairs,
        "side": side,
        "loss_seconds": common.spread(plain),
        "rule_seconds": rules,
        "overhead_seconds": {
            scope: common.spread([a - b for a, b in zip(seconds[scope], plain, strict=True)])
            for scope in SCOPES
        },
        "steps": steps,
        "share_of_step": {
            name: {scope: rules[scope]["median"] / step["median"] for scope in SCOPES}
            for name, step in steps.items()
        },
    }


def show(entries: list[dict[str, Any]]) -> None:
    """Print the table: shares first, then overheads with quartiles and the rule alone."""
    rows = []
    for entry in entries:
        shares = [
            " / ".join(f"{100 * share[scope]:.3f} %" for scope in SCOPES) + f" ({name})"
            for name, share in entry["share_of_step"].items()
        ]
        row = [f"{entry['pairs']}x{entry['side']}", "; ".join(shares) or "-"]
        for scope in SCOPES:
            over = entry["overhead_seconds"][scope]
            middle, low, high = (1e6 * over[k] for k in ("median", "quartile_1", "quartile_3"))
            row.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
        row += [f"{1e6 * entry['rule_seconds'][scope]['median']:.0f}" for scope in SCOPES]
        rows.append([*row, f"{1e6 * entry['loss_seconds']['median']:.0f}"])
    head = ["shape", "share of a step, batch / pair", "batch us", "pair us"]
    common.print_table([*head, "rule batch us", "rule pair us", "plain loss us"], rows)


def main() -> int:
    """Run, print, write."""
    options = parse(Options, sys.argv[1:], "safeguard.py", __doc__)
    common.check_out(options.out)
    shapes = [parse_shape(text) for text in options.shapes]
    if options.step_json and not options.step_json.is_file():
        raise UserError(f"--step_json: there is no file {options.step_json}")
    entries = [measure(options, pairs, side) for pairs, side in shapes]
    show(entries)
    settings = {name: getattr(options, name) for name in ("repeats", "method", "device")}
    common.write_result(options.out, "safeguard.py", {"settings": settings, "shapes": entries})
    return 0


if __name__ == "__main__":
    run_main(main, "safeguard.py")

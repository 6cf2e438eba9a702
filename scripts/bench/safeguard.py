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

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.common import (
    TINY_MODEL,
    parser,
    print_table,
    spread,
    write_result,
)
from sdpo.common.cli import at_least
from sdpo.common.errors import UserError, run_main

SCOPES = ("batch", "pair")
# SD1.5 at 256 and 512 px, SDXL at 1024, one pair and the recipes' eight; the tiny model's.
SHAPES = ("8x16", "1x32", "1x64", "8x64", "1x128", "8x128")


def parse() -> argparse.Namespace:
    """The benchmark's flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    found = parser("safeguard.py", __doc__)
    add = found.add_argument
    add("--shapes", nargs="+", default=list(SHAPES), metavar="PAIRSxSIDE")
    add("--repeats", type=int, default=200, help="turns of each shape, default: 200")
    add("--method", default="diffusion-dpo", help="default: diffusion-dpo")
    add("--device", default="cpu", help="default: cpu")
    add("--largest_step", type=int, default=16, metavar="SIDE", help="default: 16")
    add("--step_repeats", type=int, default=10, help="turns of the tiny step, default: 10")
    add("--step_json", type=Path, metavar="FILE.json", help="what step.py wrote")
    args = found.parse_args()
    at_least(args, 2, "repeats", "step_repeats")
    args.shapes = [_shape(text) for text in args.shapes]
    if args.step_json and not args.step_json.is_file():
        raise UserError(f"--step_json: there is no file {args.step_json}")
    return args


def _shape(text: str) -> tuple[int, int]:
    pairs, _, side = text.partition("x")
    if not (pairs.isdigit() and side.isdigit() and int(pairs) and int(side)):
        raise UserError(f"--shapes: {text} is not PAIRSxSIDE, such as 8x64")
    return int(pairs), int(side)


def seconds_of(task: Callable[[], Any], device: Any) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    task()
    wait()
    return time.perf_counter() - began


def loss_tasks(method: str, pairs: int, side: int, device: Any) -> dict[str, Callable[[], None]]:
    """Loss and backward pass to the predictions: plain and in either scope; and the rule alone."""
    import torch

    from sdpo import loser_scale, preference_loss, scale_gradient

    draw = torch.Generator().manual_seed(0)
    shape = (2 * pairs, 4, side, side)
    prediction, reference, target = (
        torch.randn(shape, generator=draw).to(device) for _ in range(3)
    )
    prediction.requires_grad_()
    error = torch.ones(pairs, device=device, requires_grad=True)

    def loss(mu: float | None, scope: Any) -> None:
        prediction.grad = None
        preference_loss(
            method, prediction, reference, target, beta=5000.0, mu=mu, scope=scope, alpha=0.01
        ).loss.backward()

    def rule(scope: Any) -> None:
        error.grad = None
        residuals = (prediction.detach() - target).chunk(2)
        scale_gradient(error, loser_scale(*residuals, 0.9, scope)).sum().backward()

    return {
        "plain": lambda: loss(None, "batch"),
        **{scope: lambda scope=scope: loss(0.9, scope) for scope in SCOPES},
        **{f"rule {scope}": lambda scope=scope: rule(scope) for scope in SCOPES},
    }


def tiny_step(pairs: int, side: int, device: Any) -> Callable[[], None]:
    """UNet, reference and backward pass of the tiny model, without data, encoders and optimizer."""
    import torch
    from diffusers import UNet2DConditionModel

    from sdpo.models.forward import make_reference

    unet = UNet2DConditionModel.from_pretrained(TINY_MODEL, subfolder="unet").float().to(device)
    reference = make_reference(unet, torch.float32)
    noisy = torch.randn(2 * pairs, 4, side, side, device=device)
    timesteps = torch.full((2 * pairs,), 500, device=device)
    hidden = torch.randn(2 * pairs, 24, unet.config.cross_attention_dim, device=device)

    def step() -> None:
        with torch.no_grad():
            reference(noisy, timesteps, hidden)
        unet(noisy, timesteps, hidden).sample.square().mean().backward()

    return step


def time_in_turns(
    tasks: dict[str, Callable[[], None]], repeats: int, device: Any
) -> dict[str, list[float]]:
    """Seconds of every task, `repeats` times in turn, the order reversed each time."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for turn in range(repeats):
        for name in reversed(tasks) if turn % 2 else tasks:
            found[name].append(seconds_of(tasks[name], device))
    return found


def measure(args: argparse.Namespace, pairs: int, side: int) -> dict[str, Any]:
    """One shape's figures."""
    import torch

    device = torch.device(args.device)
    seconds = time_in_turns(loss_tasks(args.method, pairs, side, device), args.repeats, device)
    entry: dict[str, Any] = {
        "pairs": pairs,
        "side": side,
        "loss_seconds": spread(seconds["plain"]),
        "rule_seconds": {scope: spread(seconds[f"rule {scope}"]) for scope in SCOPES},
        "overhead_seconds": {
            scope: spread([a - b for a, b in zip(seconds[scope], seconds["plain"], strict=True)])
            for scope in SCOPES
        },
        "steps": {},
    }
    if side <= args.largest_step:
        task = {"tiny": tiny_step(pairs, side, device)}
        entry["steps"]["tiny"] = spread(time_in_turns(task, args.step_repeats, device)["tiny"])
    if args.step_json:
        found = json.loads(args.step_json.read_text(encoding="utf-8"))
        settings = found["settings"]
        factor = 4 if settings["size"] == "tiny" else 8
        if (settings["batch"], settings["resolution"] // factor) == (pairs, side):
            plain = found["variants"].get("no_safeguard") or found["variants"]["plain"]
            entry["steps"][f"step.py {settings['size']}"] = plain["seconds"]
    entry["share_of_step"] = {
        name: {scope: entry["rule_seconds"][scope]["median"] / step["median"] for scope in SCOPES}
        for name, step in entry["steps"].items()
    }
    return entry


def show(entries: list[dict[str, Any]]) -> None:
    """The table: shares first, then overheads with quartiles and the rule alone."""
    rows = []
    for entry in entries:
        shares = [
            " / ".join(f"{100 * share[scope]:.3f} %" for scope in SCOPES) + f" ({name})"
            for name, share in entry["share_of_step"].items()
        ]
        row = [f"{entry['pairs']}x{entry['side']}", "; ".join(shares) or "-"]
        for scope in SCOPES:
            over = entry["overhead_seconds"][scope]
            row.append(
                f"{1e6 * over['median']:.0f} ({1e6 * over['quartile_1']:.0f} to "
                f"{1e6 * over['quartile_3']:.0f})"
            )
        row += [f"{1e6 * entry['rule_seconds'][scope]['median']:.0f}" for scope in SCOPES]
        rows.append([*row, f"{1e6 * entry['loss_seconds']['median']:.0f}"])
    head = ["shape", "share of a step, batch / pair", "batch us", "pair us"]
    print_table([*head, "rule batch us", "rule pair us", "plain loss us"], rows)


def main() -> int:
    """Run, print, write."""
    args = parse()
    entries = [measure(args, pairs, side) for pairs, side in args.shapes]
    show(entries)
    settings = {"repeats": args.repeats, "method": args.method, "device": args.device}
    write_result(args.out, "safeguard.py", {"settings": settings, "shapes": entries})
    return 0


if __name__ == "__main__":
    run_main(main, "safeguard.py")

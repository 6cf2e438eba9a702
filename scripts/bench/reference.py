"""What the reference's precision does to the margin, on the tiny SD1.5 of assets/.

    bash scripts/bench/reference.sh [--steps 20] [--pairs 96]

A policy is trained for some steps in float32. Then the margin of held-out pairs,

    delta = (L_w - L_l) - (Lref_w - Lref_l),

is taken with either model in another precision. `reference` is what the reference's own precision
adds: the root mean square of the difference to a reference whose weights are float32 and that is
computed as the policy is; `all` is the difference to both in float32. Both are given in percent of
delta's standard deviation; `at the start` is the same in units of beta * delta / 2 before the first
step, where delta ought to be 0.

The bound: the reference's own precision adds at most 1 % of the spread, and nothing at the start. A
run holds its reference in the run's own dtype, the lowest that keeps the bound, since autocast
rounds those weights anyway: it adds 0 to the bit. One below it (bfloat16 in a float32 run, float8
in a bfloat16 one) breaks both halves. A float32 reference in a bfloat16 run costs twice the memory,
and although it lowers the sum of all errors once the policy has moved, such a run starts from
margins that are not 0. Hence there is no flag.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.common import TINY_MODEL, parser, print_table, write_result
from sdpo.common.cli import at_least
from sdpo.common.errors import run_main

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sdpo.models.forward import NoisedPairs

BETA = 5000.0
# Policy computed in, reference's weights held in, reference computed in; the runs' own pairs first.
CASES = (
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float16", "float16"),
    ("float32", "bfloat16", "float32"),
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float16", "float16"),
    ("bfloat16", "float32", "float32"),
    ("bfloat16", "float16", "float16"),
    ("bfloat16", "float8_e4m3fn", "bfloat16"),
)


def parse() -> argparse.Namespace:
    """The benchmark's flags.

    Raises:
        UserError: a number is too small.
    """
    add = (found := parser("reference.py", __doc__)).add_argument
    add("--steps", type=int, default=20, help="steps of 8 pairs the policy takes (default: 20)")
    add("--pairs", type=int, default=96, help="pairs the margin is taken of (default: 96)")
    args = found.parse_args()
    at_least(args, 1, "steps")
    at_least(args, 16, "pairs")
    return args


def batches(bench: argparse.Namespace, work: Path) -> Any:
    """Endless `NoisedPairs` of 8 pairs of the tiny world, as train.py makes them."""
    import torch

    from sdpo.args import parse_args
    from sdpo.data.loader import PairLoader
    from sdpo.data.source import open_pairs
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.encoding import ModelEncoder
    from sdpo.models.forward import noise_pairs
    from sdpo.tinyworld.pairs import write_pairs

    write_pairs(work / "pairs", 8 * bench.steps + bench.pairs, 8, seed=0)
    flags = f"""--pretrained_model_name_or_path {TINY_MODEL} --train_data_dir {work / "pairs"}
        --output_dir {work / "run"} --cache_dir {work / "cache"} --resolution 64
        --train_batch_size 8"""
    args = parse_args(flags.split())
    family, source = get_family(sdxl=False), ModelSource.from_args(args)
    encoder = ModelEncoder(family, family.load_frozen(source), 64, torch.device("cpu"))
    for batch in PairLoader(open_pairs(args), args, rank=0, world_size=1):
        yield noise_pairs(encoder, batch)


def held_in(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose linear and convolutional weights are rounded to `dtype` (and float32 again)."""
    from torch import nn

    rounded = copy.deepcopy(unet)
    for module in rounded.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype).float()
    return rounded


def errors(unet: nn.Module, inputs: list[NoisedPairs], dtype: torch.dtype) -> Tensor:
    """L_w - L_l of every pair, float64, computed under autocast to `dtype` (float32: without)."""
    import torch

    from sdpo.losses.terms import per_sample_mse
    from sdpo.models.forward import predict

    found = []
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast:
        for item in inputs:
            winner, loser = per_sample_mse(predict(unet, item).float() - item.target).chunk(2)
            found.append(winner.double() - loser.double())
    return torch.cat(found)


def train(unet: nn.Module, base: nn.Module, inputs: list[NoisedPairs]) -> None:
    """Diffusion-DPO with the safeguard, one step for each of `inputs`, in float32."""
    import torch

    from sdpo import preference_loss
    from sdpo.models.forward import predict

    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    for item in inputs:
        with torch.no_grad():
            reference = predict(base, item)
        prediction = predict(unet, item)
        loss = preference_loss(
            "diffusion-dpo", prediction, reference, item.target, beta=BETA, mu=0.9
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> int:
    """Train, measure, print, write."""
    bench = parse()
    import torch

    from sdpo.common.processes import quieten_libraries
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource

    quieten_libraries()
    base = get_family(sdxl=False).load_unet(ModelSource(str(TINY_MODEL)))
    # The file is float16 already, which would flatter it; a step away no weight is.
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=rng))
    with tempfile.TemporaryDirectory(prefix="sdpo-bench-") as work:
        made = batches(bench, Path(work))
        train_inputs = [next(made) for _ in range(bench.steps)]
        inputs = [next(made) for _ in range(-(-bench.pairs // 8))]
    policy = copy.deepcopy(base)
    train(policy, base, train_inputs)
    dtypes = sorted({name for case in CASES for name in case})
    of = {name: getattr(torch, name) for name in dtypes}
    held = {name: held_in(base, of[name]) for name in dtypes}
    computed = sorted({name for case in CASES for name in case[::2]})
    of_policy = {name: errors(policy, inputs, of[name]) for name in computed}
    of_start = {name: errors(base, inputs, of[name]) for name in computed}
    exact = of_policy["float32"] - of_start["float32"]
    results = []
    for run, weights, compute in CASES:
        reference = errors(held[weights], inputs, of[compute])
        own = (reference - of_start[run]).square().mean().sqrt()
        both = (of_policy[run] - reference - exact).square().mean().sqrt()
        results.append(
            {
                "policy": run,
                "reference_weights": weights,
                "reference_computed": compute,
                "reference_percent": (100 * own / exact.std()).item(),
                "all_percent": (100 * both / exact.std()).item(),
                "at_the_start": (BETA / 2 * own).item(),
            }
        )
    rows = [
        [*list(r.values())[:3], *(f"{r[k]:.2f}" for k in list(r)[3:5]), f"{r['at_the_start']:.3f}"]
        for r in results
    ]
    head = ["policy", "ref. weights", "ref. computed", "reference, %", "all, %", "at the start"]
    print_table(head, rows)
    print(f"standard deviation of delta: {exact.std().item():.2e} over {len(exact)} pairs")
    settings = {"steps": bench.steps, "pairs": bench.pairs, "beta": BETA, "bound_percent": 1.0}
    about = {"settings": settings, "delta_std": exact.std().item(), "cases": results}
    write_result(bench.out, "reference.py", about)
    return 0


if __name__ == "__main__":
    run_main(main, "reference")

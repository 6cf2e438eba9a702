"""What training did to pairs it never saw: errors of winners and losers against the reference, for
every checkpoint of a run, over the same pairs, timesteps and noise.

    python -m sdpo.evaluation.heldout RUN_DIR --train_data_dir DIR --split heldout

writes RUN_DIR/heldout.jsonl, one line a checkpoint. Step 0 is the reference itself. With --ema it
measures the moving averages and writes RUN_DIR/heldout_ema.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.cli import Parser, at_least
from sdpo.common.errors import UserError, run_main
from sdpo.common.files import write_text
from sdpo.training.checkpoint_paths import EMA_FILE, UNET_FILE, list_checkpoints, step_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdpo.data.source import PairSource
    from sdpo.models.encoding import Encoder
    from sdpo.models.forward import NoisedPairs

HELDOUT_FILE = "heldout.jsonl"
HELDOUT_EMA_FILE = "heldout_ema.jsonl"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's flags.

    Raises:
        UserError: on a run that is not there or holds no checkpoint.
    """
    args = parse_flags(argv)
    if not (args.run / "config.json").is_file():
        raise UserError(f"{args.run} is not a run: it has no config.json")
    if not list_checkpoints(args.run):
        raise UserError(f"{args.run} holds no complete checkpoint")
    if args.ema and not (list_checkpoints(args.run)[-1] / EMA_FILE).is_file():
        raise UserError(f"--ema: {args.run} holds no {EMA_FILE}; it was not run with --use_ema")
    return args


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's flags, checked as far as that goes before there is a run.

    Raises:
        UserError: on a value out of range.
    """
    args = build_parser().parse_args(argv)
    at_least(args, 1, "max_pairs", "timesteps", "batch_size")
    return args


def build_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = Parser("python -m sdpo.evaluation.heldout", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="--output_dir of a run")
    add("--dataset_name", help="held-out pairs on the hub (default: the run's own data)")
    add("--train_data_dir", help="held-out pairs on disk (default: the run's own data)")
    add("--split", required=True, help="split to evaluate on, e.g. validation_unique")
    add("--max_pairs", type=int, default=256, help="default: 256")
    add("--timesteps", type=int, default=4, help="timesteps per pair, stratified (default: 4)")
    add("--batch_size", type=int, help="pairs at a time (default: the run's --train_batch_size)")
    add("--ema", action="store_true", help="measure the averages of a run with --use_ema instead")
    return parser


def main() -> int:
    """Evaluate every checkpoint of one run and write heldout.jsonl."""
    args = parse_args(sys.argv[1:])
    import torch
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    from sdpo.common.processes import quieten_libraries
    from sdpo.data.source import open_pairs
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.encoding import ModelEncoder
    from sdpo.models.loading import load_strictly, read_state_dict

    quieten_libraries()
    run_args = _run_args(args)
    device = Accelerator().device
    family = get_family(run_args.sdxl)
    source = ModelSource.from_args(run_args)
    pairs = open_pairs(run_args)
    frozen = family.load_frozen(source).to(device, torch.float32, torch.float32)
    encoder = ModelEncoder(family, frozen, run_args.resolution, device)
    unet = family.load_unet(source).to(device).eval()
    inputs = list(heldout_inputs(encoder, pairs, run_args, args))
    beta = run_args.beta_dpo
    reference = pair_errors(unet, inputs, args.timesteps)
    entries = [summarise(0, *reference, *reference, beta)]
    checkpoints = list_checkpoints(args.run)
    for path in tqdm(checkpoints, desc=f"held-out {args.run.name}", unit="checkpoint"):
        weights = path / (EMA_FILE if args.ema else UNET_FILE)
        load_strictly(unet, read_state_dict(weights), str(weights))
        errors = pair_errors(unet, inputs, args.timesteps)
        entries.append(summarise(step_of(path), *errors, *reference, beta))
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    write_text(args.run / (HELDOUT_EMA_FILE if args.ema else HELDOUT_FILE), lines)
    return 0


def _run_args(args: argparse.Namespace) -> argparse.Namespace:
    """The run's own flags, its data replaced by the held-out split, without augmentation."""
    values = json.loads((args.run / "config.json").read_text(encoding="utf-8"))["args"]
    if args.dataset_name or args.train_data_dir:
        values["dataset_name"], values["train_data_dir"] = args.dataset_name, args.train_data_dir
    values.update(
        split=args.split,
        max_train_samples=args.max_pairs,
        # Reading a split of a dataset on the hub must not download the others.
        streaming=not Path(values["train_data_dir"] or values["dataset_name"]).is_dir(),
        random_crop=False,
        no_hflip=True,
        proportion_empty_prompts=0.0,
    )
    return argparse.Namespace(**values)


def heldout_inputs(
    encoder: Encoder,
    pairs: PairSource,
    run_args: argparse.Namespace,
    args: argparse.Namespace,
) -> Iterator[NoisedPairs]:
    """The same noised pairs for every checkpoint, at `args.timesteps` timesteps each.

    Timesteps are stratified: the i-th of k is drawn from the i-th k-th of the schedule.
    """
    import torch

    from sdpo.common import randomness
    from sdpo.data.pairs import PairDecoder, collate
    from sdpo.data.transforms import PairTransform, UndecodableImage
    from sdpo.models.forward import noise_pairs

    transform = PairTransform(run_args.resolution, hflip=False)
    decode = PairDecoder(pairs.columns, pairs.base, transform, 0.0)
    rows = first_rows(pairs, args.max_pairs)
    batch_size = args.batch_size or run_args.train_batch_size
    count = encoder.schedule.config.num_train_timesteps
    for stratum in range(args.timesteps):
        for first in range(0, len(rows), batch_size):
            samples = []
            for i in range(first, min(first + batch_size, len(rows))):
                number, row = rows[i]
                try:
                    samples.append(decode(row, (run_args.seed, stratum, i)))
                except UndecodableImage as error:
                    raise UserError(f"row {number} cannot be decoded: {error}") from None
            batch = collate(samples)
            draws = [randomness.uniform(*key, "stratum") for key in batch.keys]
            timesteps = torch.tensor([int((stratum + d) / args.timesteps * count) for d in draws])
            yield noise_pairs(encoder, batch, timesteps=timesteps)


def first_rows(pairs: PairSource, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Up to `count` decided pairs, undecoded, with their rows' numbers.

    Raises:
        UserError: there is none.
    """
    from sdpo.data.stream import is_wanted

    if pairs.origin is not None:
        chosen = range(min(count, len(pairs)))
        return [(int(pairs.origin[i]), pairs.rows[i]) for i in chosen]
    numbered = ((i, row) for i, row in enumerate(pairs.rows) if is_wanted(row, i))
    found = list(islice(numbered, count))
    if not found:
        raise UserError("--split: no decided pair in it")
    return found


def pair_errors(
    unet: nn.Module, inputs: list[NoisedPairs], timesteps: int
) -> tuple[Tensor, Tensor]:
    """Winners' and losers' errors, mean of squares over pixels, each (timesteps, pairs) float32 on
    the CPU."""
    import torch

    from sdpo.losses.terms import per_sample_mse
    from sdpo.models.forward import predict

    winners, losers = [], []
    with torch.no_grad():
        for item in inputs:
            error_w, error_l = per_sample_mse(predict(unet, item).float() - item.target).chunk(2)
            winners.append(error_w.cpu())
            losers.append(error_l.cpu())
    return (
        torch.cat(winners).reshape(timesteps, -1),
        torch.cat(losers).reshape(timesteps, -1),
    )


def summarise(
    step: int, winner: Tensor, loser: Tensor, ref_winner: Tensor, ref_loser: Tensor, beta: float
) -> dict[str, float]:
    """One checkpoint's line, from errors (timesteps, pairs). Drifts are given in percent of the
    reference's mean error too, the winner's with its standard error over pairs."""
    drift_w, drift_l = winner - ref_winner, loser - ref_loser
    margin = drift_w - drift_l
    per_pair = drift_w.mean(0)
    standard_error = per_pair.std() / len(per_pair) ** 0.5
    return {
        "step": step,
        "pairs": len(per_pair),
        "timesteps": len(drift_w),
        "winner_mse": winner.mean().item(),
        "loser_mse": loser.mean().item(),
        "ref_winner_mse": ref_winner.mean().item(),
        "ref_loser_mse": ref_loser.mean().item(),
        "winner_drift": drift_w.mean().item(),
        "loser_drift": drift_l.mean().item(),
        "winner_drift_percent": 100 * (drift_w.mean() / ref_winner.mean()).item(),
        "winner_drift_percent_se": 100 * (standard_error / ref_winner.mean()).item(),
        "loser_drift_percent": 100 * (drift_l.mean() / ref_loser.mean()).item(),
        "margin": margin.mean().item(),
        "implicit_acc": (-0.5 * beta * margin > 0).float().mean().item(),
    }


def read_heldout(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's heldout.jsonl; [] where there is none."""
    path = run / HELDOUT_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    run_main(main, "sdpo.heldout")

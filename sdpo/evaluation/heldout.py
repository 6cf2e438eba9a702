"""What training did to pairs it never saw: errors of winners and losers against the reference, for
every checkpoint of a run, over the same pairs, timesteps and noise.

    python -m sdpo.evaluation.heldout RUN_DIR --train_data_dir DIR --split heldout

writes RUN_DIR/heldout.jsonl, one line a checkpoint. Step 0 is the reference itself. With --ema it
measures the moving averages and writes RUN_DIR/heldout_ema.jsonl. The run's card, README.md, gets
the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import write_text
from sdpo.common.flags import at_least, flag, from_flat, parse
from sdpo.common.processes import start
from sdpo.config import TrainConfig
from sdpo.training.checkpoint_paths import EMA_FILE, UNET_FILE, list_checkpoints, step_of
from sdpo.training.places import check_bitsandbytes
from sdpo.training.runlog import CONFIG_FILE, HELDOUT_EMA_FILE, HELDOUT_FILE, read_config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sdpo.data.source import PairSource
    from sdpo.models.base import Family
    from sdpo.models.encoding import Encoder
    from sdpo.models.forward import NoisedPairs


@dataclass(frozen=True)
class HeldoutConfig:
    """The program's flags."""

    run: Path = flag(None, "--output_dir of a run", positional=True)
    dataset_name: str | None = flag(
        None, "held-out pairs on the hub", metavar="ID_OR_DIR", shown="the run's own data"
    )
    train_data_dir: str | None = flag(
        None, "held-out pairs on disk", metavar="DIR", shown="the run's own data"
    )
    split: str = flag("", "split to evaluate on, e.g. validation_unique", required=True)
    max_pairs: int = flag(256, "pairs of it", check=at_least(1))
    timesteps: int = flag(4, "timesteps per pair, stratified", check=at_least(1))
    batch_size: int | None = flag(
        None, "pairs at a time", check=at_least(1), shown="the run's --train_batch_size"
    )
    ema: bool = flag(False, "measure the averages of a run with --use_ema instead")


def parse_config(argv: list[str]) -> HeldoutConfig:
    """Parse the program's flags as far as that goes before there is a run.

    Raises:
        UserError: on a value out of range.
    """
    return parse(HeldoutConfig, argv, "python -m sdpo.evaluation.heldout", __doc__)


def check_run(config: HeldoutConfig) -> None:
    """Check that there is a run with what is to be measured.

    Raises:
        UserError: it is not there, or holds no checkpoint or no average.
    """
    run = config.run
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run: it has no config.json")
    if not list_checkpoints(run):
        raise UserError(f"{run} holds no complete checkpoint")
    if config.ema and not (list_checkpoints(run)[-1] / EMA_FILE).is_file():
        raise UserError(f"--ema: {run} holds no {EMA_FILE}; it was not run with --use_ema")


def main() -> int:
    """Evaluate every checkpoint of one run and write heldout.jsonl."""
    config = parse_config(sys.argv[1:])
    check_run(config)
    train = run_config(config)
    if train.model.quantize_base:
        check_bitsandbytes("quantize_base")
    import torch
    from tqdm.auto import tqdm

    from sdpo.data.buckets import in_buckets
    from sdpo.data.source import open_pairs
    from sdpo.evaluation.score.summary import print_grid
    from sdpo.models import open_base
    from sdpo.models.encoding import ModelEncoder
    from sdpo.models.loading import load_strictly, read_state_dict
    from sdpo.models.lora_file import merge_lora
    from sdpo.models.quantized import round_linear_layers
    from sdpo.training.card import write_run_card
    from sdpo.training.made import CARD_FILE

    device = start().device
    family, source = open_base(train)
    pairs = open_pairs(train.data, train.run.seed)
    if pairs.origin is not None:
        pairs = in_buckets(pairs, train.data)
    frozen = family.load_frozen(source).to(device, torch.float32, torch.float32)
    encoder = ModelEncoder(family, frozen, train.data.resolution, device)
    unet = family.load_unet(source)
    if train.model.quantize_base:
        round_linear_layers(unet, train.model.quantize_base, device)
    if train.model.lora_init:  # it is part of the run's reference
        merge_lora(unet, Path(train.model.lora_init), "--lora_init")
    unet.to(device).eval()
    inputs = list(heldout_inputs(encoder, pairs, train, config))
    beta = train.method.beta_dpo
    reference = pair_errors(family, unet, inputs, config.timesteps)
    entries = [summarise(0, *reference, *reference, beta)]
    checkpoints = list_checkpoints(config.run)
    for path in tqdm(checkpoints, desc=f"held-out {config.run.name}", unit="checkpoint"):
        weights = path / (EMA_FILE if config.ema else UNET_FILE)
        load_strictly(unet, read_state_dict(weights), str(weights))
        errors = pair_errors(family, unet, inputs, config.timesteps)
        entries.append(summarise(step_of(path), *errors, *reference, beta))
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    out = config.run / (HELDOUT_EMA_FILE if config.ema else HELDOUT_FILE)
    write_text(out, lines)
    print_grid(grid(entries))
    print(f"\nwrote {out}")
    if (config.run / CARD_FILE).is_file():
        write_run_card(config.run)
    return 0


def run_config(config: HeldoutConfig) -> TrainConfig:
    """Read the run's own settings, its data replaced by the held-out split, without augmentation.
    Flags that an older run's config.json lacks have their defaults."""
    values = read_config(config.run)["args"]
    if config.dataset_name or config.train_data_dir:
        values["dataset_name"] = config.dataset_name
        values["train_data_dir"] = config.train_data_dir
    values.update(
        split=config.split,
        max_train_samples=config.max_pairs,
        # Reading a split of a dataset on the hub must not download the others.
        streaming=not Path(values["train_data_dir"] or values["dataset_name"]).is_dir(),
        stream_shards="all",
        random_crop=False,
        no_hflip=True,
        proportion_empty_prompts=0.0,
    )
    return from_flat(TrainConfig, values)


def heldout_inputs(
    encoder: Encoder, pairs: PairSource, train: TrainConfig, config: HeldoutConfig
) -> Iterator[NoisedPairs]:
    """Noise the same pairs for every checkpoint, at `config.timesteps` timesteps each.

    Timesteps are stratified: the i-th of k is drawn from the i-th k-th of the noise process. With
    --resize bucket pairs come by their shapes.
    """
    from sdpo.common import randomness
    from sdpo.common.images import UndecodableImage
    from sdpo.data.buckets import shape_of_row
    from sdpo.data.pairs import PairDecoder, collate
    from sdpo.data.source import SHAPE
    from sdpo.data.transforms import PairTransform
    from sdpo.models.forward import noise_pairs

    resolution = train.data.resolution
    transform = PairTransform(resolution, hflip=False)
    decode = PairDecoder(pairs.columns, pairs.base, transform, 0.0)
    rows = first_rows(pairs, config.max_pairs)
    if train.data.resize == "bucket" and pairs.shapes is None:  # of a stream
        rows = [(n, {**row, SHAPE: shape_of_row(row, pairs, resolution)}) for n, row in rows]
    batch_size = config.batch_size or train.optim.train_batch_size
    batches = batches_of_one_shape([row.get(SHAPE) for _, row in rows], batch_size)
    for stratum in range(config.timesteps):
        for places in batches:
            samples = []
            for i in places:
                number, row = rows[i]
                try:
                    samples.append(decode(row, (train.run.seed, stratum, i)))
                except UndecodableImage as error:
                    raise UserError(f"row {number} cannot be decoded: {error}") from None
            batch = collate(samples)
            draws = [randomness.uniform(*key, "stratum") for key in batch.keys]
            shares = [(stratum + draw) / config.timesteps for draw in draws]
            yield noise_pairs(encoder, batch, timesteps=encoder.process.times_at(shares))


def batches_of_one_shape(shapes: list[Any], batch_size: int) -> list[list[int]]:
    """Put the places of a list into batches, of one shape each."""
    groups: dict[Any, list[int]] = {}
    for place, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(place)
    return [
        group[first : first + batch_size]
        for group in groups.values()
        for first in range(0, len(group), batch_size)
    ]


def first_rows(pairs: PairSource, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Take up to `count` decided pairs, undecoded, with their rows' numbers.

    Raises:
        UserError: there is none.
    """
    from sdpo.data.stream import is_wanted

    if pairs.origin is not None:
        chosen = range(min(count, len(pairs)))
        return [(int(pairs.origin[i]), pairs.row(i)) for i in chosen]
    numbered = ((i, row) for i, row in enumerate(pairs.rows) if is_wanted(row, i))
    found = list(islice(numbered, count))
    if not found:
        raise UserError("--split: no decided pair in it")
    return found


def pair_errors(
    family: Family, unet: nn.Module, inputs: list[NoisedPairs], timesteps: int
) -> tuple[Tensor, Tensor]:
    """Compute winners' and losers' errors, mean of squares over pixels, each (timesteps, pairs)
    float32 on the CPU."""
    import torch

    from sdpo.losses.terms import per_sample_mse
    from sdpo.models.forward import predict

    winners, losers = [], []
    with torch.no_grad():
        for item in inputs:
            error_w, error_l = per_sample_mse(
                predict(family, unet, item).float() - item.target
            ).chunk(2)
            winners.append(error_w.cpu())
            losers.append(error_l.cpu())
    return (
        torch.cat(winners).reshape(timesteps, -1),
        torch.cat(losers).reshape(timesteps, -1),
    )


def summarise(
    step: int, winner: Tensor, loser: Tensor, ref_winner: Tensor, ref_loser: Tensor, beta: float
) -> dict[str, float]:
    """Make one checkpoint's line from errors (timesteps, pairs). Drifts are given in percent of the
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


def grid(entries: list[dict[str, float]]) -> list[list[str]]:
    """Lay lines of heldout.jsonl out as text, the first one the head."""
    lines = [["step", "winner drift", "loser drift", "margin", "implicit accuracy"]]
    for entry in entries:
        winner, error = entry["winner_drift_percent"], entry["winner_drift_percent_se"]
        cells = [f"{winner:+.2f} ± {error:.2f} %", f"{entry['loser_drift_percent']:+.2f} %"]
        cells += [f"{entry['margin']:+.3g}", f"{entry['implicit_acc']:.3f}"]
        lines.append([str(entry["step"]), *cells])
    return lines


def read_heldout(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's heldout.jsonl; [] where there is none."""
    path = run / HELDOUT_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    run_main(main, "sdpo.heldout")

"""The three measurements of an audit, each a file of JSON lines in its directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from sdpo.common import randomness
from sdpo.common.jsonl import JsonLines, read_lines
from sdpo.common.processes import quieten_libraries
from sdpo.data.loader import PairLoader
from sdpo.data.order import FIRST
from sdpo.data.pairs import PairBatch
from sdpo.data.source import open_pairs
from sdpo.lab.audit.gradients import Branches, branches, modes
from sdpo.lab.audit.jacobian import Sample, branch_alignment, spectrum
from sdpo.lab.audit.updates import Moments, WinnerErrors, clipped, displacements
from sdpo.models import get_family
from sdpo.models.base import ModelSource
from sdpo.models.encoding import ModelEncoder
from sdpo.models.forward import NoisedPairs, make_reference, noise_pairs, predict
from sdpo.models.loading import load_strictly, read_state_dict
from sdpo.training.checkpoint import load_training, read_progress
from sdpo.training.checkpoint_paths import UNET_FILE
from sdpo.training.optim import scaled_learning_rate

PARTS = ("updates", "jacobian", "spectrum")


@dataclass
class Subject:
    """What is audited, loaded: the checkpoint's UNet, its reference, and its next batches."""

    args: argparse.Namespace
    unet: nn.Module
    reference: nn.Module
    encoder: ModelEncoder
    loader: PairLoader
    moments: Moments | None  # of the checkpoint, if it has any

    def __post_init__(self) -> None:
        named = [(n, p) for n, p in self.unet.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]

    def branches(self, inputs: NoisedPairs) -> Branches:
        """Of one batch, at the checkpoint's weights."""
        with torch.no_grad():
            reference = predict(self.reference, inputs)
        form = self.args.dspo_form or self.encoder.family.name
        return branches(self.unet, self.parameters, inputs, reference, self.args, form)

    def errors(self, inputs: NoisedPairs) -> WinnerErrors:
        """Of the winners of one batch."""
        return WinnerErrors(self.unet, self.names, self.parameters, inputs)

    def sample(self, inputs: NoisedPairs, index: int) -> Sample:
        """One of the 2B samples."""
        alone = inputs.samples(slice(index, index + 1))
        return Sample(self.unet, self.names, self.parameters, alone)

    def noised(self, batch: PairBatch, timesteps: torch.Tensor | None = None) -> NoisedPairs:
        """As in training, or at timesteps of one's own, (B,)."""
        args = self.args
        return noise_pairs(
            self.encoder, batch, args.noise_offset, args.input_perturbation, timesteps
        )


def measure(args: argparse.Namespace, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Bring all three files to their full length; what is there is kept.

    Raises:
        UserError: model, data or checkpoint cannot be read, or do not fit.
    """
    paths = {name: out / f"{name}.jsonl" for name in PARTS}
    wanted = {
        "updates": args.steps,
        "jacobian": args.jacobian_pairs,
        "spectrum": args.spectrum_pairs,
    }
    with ExitStack() as stack:
        files = {name: stack.enter_context(closing(JsonLines(p))) for name, p in paths.items()}
        if any(files[name].count < wanted[name] for name in PARTS):
            subject = load(args)
            _measure_updates(subject, files["updates"])

            def estimated(winner: Sample, loser: Sample) -> dict[str, Any]:
                generator = randomness.generator(args.seed, files["spectrum"].count, "probes")
                return spectrum(winner, loser, args.probes, args.lanczos, generator)

            for name, measured in (("jacobian", branch_alignment), ("spectrum", estimated)):
                _measure_pairs(subject, files[name], wanted[name], name, measured)
    return {name: read_lines(path) for name, path in paths.items()}


def load(args: argparse.Namespace) -> Subject:
    """Models, data and moments.

    Raises:
        UserError: see `measure`.
    """
    quieten_libraries()
    device = Accelerator().device
    family = get_family(args.sdxl)
    source = ModelSource.from_args(args)
    given = Path(args.checkpoint) if args.checkpoint else None
    start = FIRST
    if given is not None and given.is_dir():
        instead = f"give the same flag, or the file {UNET_FILE} in it"
        start = read_progress(given, args, "--checkpoint", instead).place
    loader = PairLoader(open_pairs(args), args, rank=0, world_size=1, start=start)
    unet = family.load_unet(source).to(device).eval()
    reference = make_reference(unet, torch.float32)
    moments = None
    if given is not None:
        file = given / UNET_FILE if given.is_dir() else given
        load_strictly(unet, read_state_dict(file), str(file))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if given is not None and given.is_dir():
        moments = Moments.read(load_training(given), list(unet.parameters()), given)
    frozen = family.load_frozen(source).to(device, torch.float32, torch.float32)
    encoder = ModelEncoder(family, frozen, args.resolution, device)
    return Subject(args, unet, reference, encoder, loader, moments)


def _measure_updates(subject: Subject, lines: JsonLines) -> None:
    args = subject.args
    if lines.count >= args.steps:
        return
    bar = tqdm(total=args.steps, initial=lines.count, desc="updates", unit="batch")
    learning_rate = scaled_learning_rate(args, 1)
    batches = iter(subject.loader)
    moments = subject.moments or _estimated_moments(subject, batches)
    coming = next(batches)
    for index in range(args.steps):
        batch, coming = coming, next(batches)
        if index < lines.count:
            continue
        inputs = subject.noised(batch)
        found = subject.branches(inputs)
        # The update is made of `batch`; training goes wrong or right on the pairs that it is not.
        errors = {"own": subject.errors(inputs), "next": subject.errors(subject.noised(coming))}
        records = []
        for mode, treated in modes(found, args.winner_preserving_mu, args.fixed_scales).items():
            steps = displacements(
                treated.gradient, subject.parameters, moments, args, learning_rate
            )
            for update, displacement in steps.items():
                record: dict[str, Any] = {"mode": mode, "update": update, "scale": treated.scale}
                for on, winners in errors.items():
                    record[on] = {
                        "first_order": winners.first_order(displacement).tolist(),
                        "realised": winners.realised(displacement).tolist(),
                    }
                records.append(record)
        entry: dict[str, Any] = {"batch": index, "records": records}
        for on, winners in errors.items():
            entry[on] = {
                "timesteps": winners.batch.timesteps.tolist(),
                "winner_error": winners.before.tolist(),
            }
        lines.write(entry)
        bar.update()
    bar.close()


def _estimated_moments(subject: Subject, batches: Iterator[PairBatch]) -> Moments:
    """Those of --moment_batches steps at these weights, by the flags' own treatment of losers."""
    args = subject.args
    moments = Moments.none(subject.parameters)
    mode = "none"
    if args.use_winner_preserving:
        at_output = args.winner_preserving_space == "output"
        mode = args.winner_preserving_scope if at_output else "parameter"
    for _ in tqdm(range(args.moment_batches), desc="moments", unit="batch"):
        found = subject.branches(subject.noised(next(batches)))
        treated = modes(found, args.winner_preserving_mu, [])[mode]
        moments = moments.after(clipped(treated.gradient, args.max_grad_norm), args)
    return moments


def _measure_pairs(
    subject: Subject,
    lines: JsonLines,
    total: int,
    what: str,
    measured: Callable[[Sample, Sample], dict[str, Any]],
) -> None:
    """Add what is `measured` on winner and loser of each pair that is not measured yet."""
    with tqdm(total=total, initial=lines.count, desc=what, unit="pair") as bar:
        for winner, loser in _stratified(subject, total, lines.count):
            timestep = int(winner.inputs.timesteps[0])
            lines.write({"timestep": timestep, **measured(winner, loser)})
            bar.update()


def _stratified(subject: Subject, total: int, done: int) -> Iterator[tuple[Sample, Sample]]:
    """Winner and loser of the first `total` pairs but for `done`, pair i at a timestep of the i-th
    of `total` equal parts of the schedule."""
    if done >= total:
        return
    count = subject.encoder.schedule.config.num_train_timesteps
    index = 0
    for batch in subject.loader:
        size = len(batch)
        if index + size > done:
            draws = [randomness.uniform(*key, "stratum") for key in batch.keys]
            places = [min((index + i + d) / total, 1 - 1e-9) for i, d in enumerate(draws)]
            inputs = subject.noised(batch, torch.tensor([int(p * count) for p in places]))
        for i in range(size):
            if index == total:
                return
            if index >= done:
                yield subject.sample(inputs, i), subject.sample(inputs, size + i)
            index += 1

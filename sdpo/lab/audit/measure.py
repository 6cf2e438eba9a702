"""The three measurements of an audit, each a file of JSON lines in its directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sdpo.common import randomness
from sdpo.common.jsonl import CountedLines, read_lines
from sdpo.common.processes import ignore_accelerates_settings, quieten_libraries
from sdpo.data.loader import PairLoader
from sdpo.data.order import FIRST
from sdpo.data.pairs import Batch
from sdpo.data.source import open_pairs
from sdpo.lab.audit.config import AuditConfig
from sdpo.lab.audit.gradients import Branches, Network, branches, modes
from sdpo.lab.audit.jacobian import Sample, branch_alignment, spectrum
from sdpo.lab.audit.updates import Moments, WinnerErrors, clipped, displacements
from sdpo.models import open_base
from sdpo.models.forward import NoisedPairs, noise_pairs, predict
from sdpo.models.loading import load_strictly, read_state_dict
from sdpo.training.build import build_loader, build_models
from sdpo.training.checkpoint import load_training, read_progress
from sdpo.training.checkpoint_paths import UNET_FILE
from sdpo.training.distributions import BINS
from sdpo.training.optim import scaled_learning_rate
from sdpo.training.state import Models, Progress, Session

PARTS = ("updates", "jacobian", "spectrum")


@dataclass
class Subject:
    """What is audited, loaded: the checkpoint's UNet, its reference, and its next batches."""

    config: AuditConfig
    models: Models
    loader: PairLoader
    moments: Moments | None  # of the checkpoint, if it has any

    def __post_init__(self) -> None:
        self.network = Network(self.models.base.family, self.models.unet)
        self.process = self.models.encoder.process

    def branches(self, inputs: NoisedPairs) -> Branches:
        """Take the two branches of one batch apart, at the checkpoint's weights."""
        assert self.models.reference is not None
        with torch.no_grad():
            reference = predict(self.network.family, self.models.reference, inputs)
        mu = self.config.safeguard.winner_preserving_mu
        return branches(self.network, inputs, reference, self.config.method, mu)

    def sample(self, inputs: NoisedPairs, index: int) -> Sample:
        """Take one of the 2B samples alone."""
        return Sample(self.network, inputs.samples(slice(index, index + 1)))

    def noised(self, batch: Batch, timesteps: torch.Tensor | None = None) -> NoisedPairs:
        """Noise a batch as in training, or at timesteps of one's own, (B,)."""
        method = self.config.method
        return noise_pairs(
            self.models.encoder, batch, method.noise_offset, method.input_perturbation, timesteps
        )


class AuditSession(Session):
    """One process that stands where the checkpoint does, if that is a directory.

    Raises:
        UserError: the checkpoint is of another run.
    """

    sharding = None

    def __init__(self, config: AuditConfig) -> None:
        ignore_accelerates_settings()
        self.config, self.accelerator = config, Accelerator(mixed_precision="no")
        self.device = self.accelerator.device
        given = Path(config.audit.checkpoint) if config.audit.checkpoint else None
        self.resume_from = given if given and given.is_dir() else None
        self.progress = Progress(0, FIRST)
        if self.resume_from:
            instead = f"give the same flag, or the file {UNET_FILE} in it"
            self.progress = read_progress(self.resume_from, config, "--checkpoint", instead)


def measure(config: AuditConfig, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Bring all three files to their full length; what is there is kept.

    Returns: the entries of each.

    Raises:
        UserError: model, data or checkpoint cannot be read, or do not fit.
    """
    audit = config.audit
    paths = {name: out / f"{name}.jsonl" for name in PARTS}
    counts = (audit.steps, audit.jacobian_pairs, audit.spectrum_pairs)
    wanted = dict(zip(PARTS, counts, strict=True))
    with ExitStack() as stack:
        files = {name: stack.enter_context(closing(CountedLines(p))) for name, p in paths.items()}
        if any(files[name].count < wanted[name] for name in PARTS):
            subject = load(config)
            _measure_updates(subject, files["updates"])

            def estimated(winner: Sample, loser: Sample) -> dict[str, Any]:
                key = (config.run.seed, files["spectrum"].count, "probes")
                generator = randomness.generator(*key)
                return spectrum(winner, loser, audit.probes, audit.lanczos, generator)

            for name, measured in (("jacobian", branch_alignment), ("spectrum", estimated)):
                _measure_pairs(subject, files[name], wanted[name], name, measured)
    return {name: read_lines(path) for name, path in paths.items()}


def load(config: AuditConfig) -> Subject:
    """Load models, data and moments, all in float32 and as they are without what a run adds for
    speed or memory.

    Raises:
        UserError: see `measure`.
    """
    quieten_libraries()
    session = AuditSession(config)
    plain = replace(
        config,
        model=replace(config.model, use_ema=False, offload_reference=False),
        optim=replace(config.optim, mixed_precision="no", channels_last=False, compile=False),
    )
    base = open_base(config)
    loader = build_loader(config, base, open_pairs(config.data, config.run.seed), session)
    models = build_models(plain, base, loader, session)
    models.unet.eval()
    moments = None
    if session.resume_from:
        training = load_training(session.resume_from)
        moments = Moments.read(training, models.trainable, session.resume_from)
    elif path := config.audit.checkpoint:
        load_strictly(models.unet, read_state_dict(Path(path)), path)
    return Subject(config, models, loader, moments)


def _measure_updates(subject: Subject, lines: CountedLines) -> None:
    config, steps = subject.config, subject.config.audit.steps
    if lines.count >= steps:
        return
    mu, fixed = config.safeguard.winner_preserving_mu, config.audit.fixed_scales
    parameters = subject.models.trainable
    learning_rate = scaled_learning_rate(config.optim, 1)
    batches = iter(subject.loader)
    moments = subject.moments or _estimated_moments(subject, batches)
    bar = tqdm(total=steps, initial=lines.count, desc="updates", unit="batch")
    coming = next(batches)
    for index in range(steps):
        batch, coming = coming, next(batches)
        if index < lines.count:
            continue
        inputs = subject.noised(batch)
        # The update is made of `batch`; training goes wrong or right on the pairs that it is not.
        errors = {
            "own": WinnerErrors(subject.network, inputs),
            "next": WinnerErrors(subject.network, subject.noised(coming)),
        }
        records: list[dict[str, Any]] = []
        for mode, treated in modes(subject.branches(inputs), mu, fixed).items():
            found = displacements(
                treated.gradient, parameters, moments, config.optim, learning_rate
            )
            for update, displacement in found.items():
                changes = {
                    on: {
                        "first_order": winners.first_order(displacement).tolist(),
                        "realised": winners.realised(displacement).tolist(),
                    }
                    for on, winners in errors.items()
                }
                records.append({"mode": mode, "update": update, "scale": treated.scale, **changes})
        measured_on = {
            on: {
                "timesteps": winners.batch.timesteps.tolist(),
                "bins": subject.process.bin_of(winners.batch.timesteps, BINS).tolist(),
                "winner_error": winners.before.tolist(),
            }
            for on, winners in errors.items()
        }
        lines.write({"batch": index, "records": records, **measured_on})
        bar.update()
    bar.close()


def _estimated_moments(subject: Subject, batches: Iterator[Batch]) -> Moments:
    """Those of --moment_batches steps at these weights, by the flags' own treatment of losers."""
    config, guard = subject.config, subject.config.safeguard
    moments = Moments.none(subject.models.trainable)
    mode = "none"
    if guard.use_winner_preserving:
        mode = "parameter" if guard.over_parameters else guard.scope
    for _ in tqdm(range(config.audit.moment_batches), desc="moments", unit="batch"):
        found = subject.branches(subject.noised(next(batches)))
        treated = modes(found, guard.winner_preserving_mu, [])[mode]
        gradient = clipped(treated.gradient, config.optim.max_grad_norm)
        moments = moments.after(gradient, config.optim)
    return moments


def _measure_pairs(
    subject: Subject,
    lines: CountedLines,
    total: int,
    what: str,
    measured: Callable[[Sample, Sample], dict[str, Any]],
) -> None:
    """Add what is `measured` on winner and loser of each pair that is not measured yet."""
    with tqdm(total=total, initial=lines.count, desc=what, unit="pair") as bar:
        for winner, loser in _stratified(subject, total, lines.count):
            time = winner.inputs.timesteps[:1]
            at = {"timestep": time.item(), "bin": int(subject.process.bin_of(time, BINS))}
            lines.write({**at, **measured(winner, loser)})
            bar.update()


def _stratified(subject: Subject, total: int, done: int) -> Iterator[tuple[Sample, Sample]]:
    """Winner and loser of the first `total` pairs but for `done`, pair i at a timestep of the i-th
    of `total` equal parts of the schedule."""
    if done >= total:
        return
    index = 0
    for batch in subject.loader:
        size = len(batch)
        if index + size > done:
            draws = [randomness.uniform(*key, "stratum") for key in batch.keys]
            places = [min((index + i + d) / total, 1 - 1e-9) for i, d in enumerate(draws)]
            inputs = subject.noised(batch, subject.process.times_at(places))
        for i in range(size):
            if index == total:
                return
            if index >= done:
                yield subject.sample(inputs, i), subject.sample(inputs, size + i)
            index += 1

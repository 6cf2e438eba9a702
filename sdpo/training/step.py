"""One optimizer step: its micro-batches, noised, and what is measured on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdpo.common.processes import raise_first
from sdpo.data.order import Place
from sdpo.losses.preference import trains_losers
from sdpo.models.forward import NoisedPairs, drawn_losers, no_losers, noise_pairs
from sdpo.training.distributions import Distributions
from sdpo.training.metrics import StepMetrics
from sdpo.training.runlog import peak_memory_gib
from sdpo.training.state import Progress, Session

if TYPE_CHECKING:
    from torch import Tensor

    from sdpo.common.randomness import Key
    from sdpo.data.pairs import Batch
    from sdpo.losses.preference import LossOutput


@dataclass(frozen=True)
class MicroBatch:
    """B pairs of one process, ready for the model.

    `scale` is the loser's where it is not the loss that takes it: a constant, or the safeguard's
    over the parameters, () or (B,). `drawn`: the losers that get a gradient, (B,) bool on the CPU,
    None where all do; `loser_weights`, (B,), then makes up for the others. `last`: of its step.
    """

    inputs: NoisedPairs
    keys: list[Key]
    place_after: Place
    scale: Tensor | float | None = None
    drawn: Tensor | None = None
    loser_weights: Tensor | None = None
    last: bool = False


class Step:
    """Optimizer step `number` of a run. `micro_batches` gives what it trains on, `record` takes in
    what came of each, `Update.apply` reduces and closes it; then `entry` is its line of
    metrics.jsonl and `progress` where the run stands."""

    def __init__(self, run: Session, batches: Iterator[Batch]) -> None:
        self.run, self.batches = run, batches
        self.number = run.progress.step + 1
        self.progress = run.progress
        self.cut_off = self.stop = False
        self.entry: dict[str, Any] = {}
        self._began = time.perf_counter()
        self._metrics = StepMetrics()
        self._spread = Distributions(run.models.encoder.process)
        self._bad_before = len(run.loader.counter.rows)
        self._place = run.progress.place

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Noise the step's micro-batches as they are asked for; ends early, with `cut_off` set,
        where a signal came and this process is alone.

        Several processes agree on stopping at the step's end: one that left now would leave the
        others waiting for its gradients. Where the safeguard takes one scale for the whole step
        from the gradients of all micro-batches, all are noised and gone through first, and kept.
        """
        count = self.run.config.optim.gradient_accumulation_steps
        gradients, one_scale = self.run.gradients, self.run.one_scale_a_step
        coming: Iterator[tuple[NoisedPairs, Batch]] = map(self._noised, self.batches)
        scale: Tensor | float | None = self.run.config.safeguard.loser_scale_fixed
        if gradients and one_scale:
            kept = []
            for _ in range(count):
                if self._is_cut_off():
                    return
                kept.append(next(coming))
                gradients.add(kept[-1][0], kept[-1][1].keys)
            coming, scale = iter(kept), gradients.step_scale()
        for number in range(count):
            if self._is_cut_off():
                return
            inputs, batch = next(coming)
            if gradients and not one_scale:
                scale = gradients.pair_scales(inputs, batch.keys)
            place_after = self.run.loader.place_after(batch)
            drawn, weights = self._drawn(batch.keys)
            last = number == count - 1
            yield MicroBatch(inputs, batch.keys, place_after, scale, drawn, weights, last)

    def _drawn(self, keys: list[Key]) -> tuple[Tensor | None, Tensor | None]:
        one_in = self.run.config.safeguard.losers_one_in
        if not trains_losers(self.run.config.method.train_method):
            return no_losers(keys), None
        if one_in == 1:
            return None, None
        drawn = drawn_losers(keys, one_in)
        return drawn, (one_in * drawn).to(self.run.device)

    def _noised(self, batch: Batch) -> tuple[NoisedPairs, Batch]:
        # Outside autocast: the frozen parts have a dtype of their own, float32 for a VAE that
        # overflows in float16.
        method = self.run.config.method
        encoder = self.run.models.encoder
        inputs = noise_pairs(encoder, batch, method.noise_offset, method.input_perturbation)
        return inputs, batch

    def _is_cut_off(self) -> bool:
        self.cut_off = bool(self.run.stop) and self.run.accelerator.num_processes == 1
        self.stop = self.stop or self.cut_off
        return self.cut_off

    def record(self, output: LossOutput, micro: MicroBatch) -> None:
        """Take in one micro-batch's measurements."""
        # A scale that holds for the whole step of all processes is counted once.
        once = self._metrics.count == 0 and self.run.accelerator.is_main_process
        self._metrics.add(output.metrics)
        timesteps = micro.inputs.timesteps[: len(micro.keys)]
        self._spread.add(output, timesteps, count_scales=once or not self.run.one_scale_a_step)
        self._place = micro.place_after

    def reduce(self) -> float:
        """Average what was recorded over micro-batches and processes, with one synchronisation;
        returns the mean loss. Called by every process.

        Raises:
            SharedError: the batches of one of them have ended in an error.
        """
        bad_rows = len(self.run.loader.counter.rows) - self._bad_before
        failed, stop = self.run.data_error is not None, bool(self.run.stop)
        self._means, sums, self._spread_sums = self._metrics.reduce(
            self.run.accelerator,
            {"stop": float(stop), "bad_rows": float(bad_rows), "failed": float(failed)},
            self._spread.sums(),
        )
        if sums["failed"]:
            raise_first(self.run.data_error)
        self.stop, self._bad_rows = sums["stop"] > 0, int(sums["bad_rows"])
        return self._means["loss"]

    def close(self, lr: float, grad_norm: float, nonfinite_steps: int) -> None:
        """Make the step's line of metrics.jsonl, and move on."""
        pairs = self.run.loader.stride * self.run.config.optim.gradient_accumulation_steps
        seconds = time.perf_counter() - self._began
        self.progress = Progress(self.number, Place(*self._place))
        self.entry = {
            "step": self.number,
            "epoch": self._place.epoch,
            **self._means,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "pairs_per_s": pairs / seconds,
            "peak_memory_gib": peak_memory_gib(self.run.device),
            "nonfinite_steps": nonfinite_steps,
            "bad_rows": self._bad_rows,
            **self._spread.read(self._spread_sums),
        }

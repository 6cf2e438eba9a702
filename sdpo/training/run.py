"""A run from its start to its end: processes, logs, checkpoints, sample grids, signals."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sdpo.common.errors import UserError, first_line
from sdpo.common.files import disk_is_full, full_disk, make_directory
from sdpo.common.processes import SharedError
from sdpo.common.signals import StopRequest
from sdpo.data.digest import changes, describe_pairs
from sdpo.data.order import FIRST
from sdpo.training.accelerator import start_accelerator
from sdpo.training.batches import SharedBatches
from sdpo.training.card import write_run_card
from sdpo.training.checkpoint import (
    clear_unfinished,
    export_run,
    load_training,
    read_progress,
    read_state,
    save_checkpoint,
)
from sdpo.training.checkpoint_paths import latest_checkpoint
from sdpo.training.distributions import BINS
from sdpo.training.hub import of_run, push_or_tell
from sdpo.training.hub_checks import check_account
from sdpo.training.parameter_safeguard import BranchGradients
from sdpo.training.runlog import RunLog, describe_run, write_config
from sdpo.training.sharding import launched_sharding, whole
from sdpo.training.state import Models, Progress, Session, gathered
from sdpo.training.step import Step
from sdpo.training.tracking import track

if TYPE_CHECKING:
    from sdpo.config import TrainConfig
    from sdpo.data.loader import PairLoader
    from sdpo.training.update import Update

log = logging.getLogger("sdpo")

LOCK_FILE = ".lock"
LOCK_PATIENCE = 10.0  # seconds


class Run(Session):
    """One run of train.py. It knows its processes and its place from the start, its models and data
    from `begin` on.

    Raises:
        UserError: the device cannot do --mixed_precision, a tracker is not installed, or a
            checkpoint is of another run or not the same to all processes.
    """

    update: Update
    data: dict[str, Any] | None = None  # what tells its pairs from others'

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output_dir = Path(config.run.output_dir)
        self.sharding = launched_sharding(config)
        self.accelerator = start_accelerator(config)
        self.device = self.accelerator.device
        self.lock = FileLock(self.output_dir / LOCK_FILE)
        self._take_directory()
        self._check_account()
        if config.optim.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.resume_from = self._find_checkpoint()
        self.progress = Progress(0, FIRST)
        if self.resume_from:
            self.progress = read_progress(self.resume_from, config)
        self.begun_at = self.progress.step
        self._check_same_start()

    @cached_property
    def training(self) -> dict[str, Any]:
        """What the checkpoint to go on from stored of optimizer and the like."""
        assert self.resume_from
        return load_training(self.resume_from)

    def _take_directory(self) -> None:
        """Hold --output_dir for this run alone, until its main process ends."""
        refusal = None
        if self.accelerator.is_main_process:
            try:
                make_directory(self.output_dir, "--output_dir")
                # Data workers of a run that was killed notice it seconds later.
                self.lock.acquire(timeout=LOCK_PATIENCE)
            except UserError as error:
                refusal = str(error)
            except Timeout:
                refusal = (
                    f"--output_dir: another run is writing to {self.output_dir}; wait for its end, "
                    "or give another directory"
                )
            except (OSError, NotImplementedError) as error:
                log.warning("%s cannot be locked (%s): one run at a time", self.output_dir, error)
            if refusal is None:
                clear_unfinished(self.output_dir)
        _refuse(refusal)

    def _check_account(self) -> None:
        """Ask the hub, before anything is loaded, whether --push_to_hub can be."""
        refusal = None
        if self.config.run.push_to_hub and self.accelerator.is_main_process:
            try:
                check_account(self.config.run)
            except UserError as error:
                refusal = str(error)
        _refuse(refusal)

    def _find_checkpoint(self) -> Path | None:
        wanted = self.config.run.resume_from_checkpoint
        if wanted == "none":
            return None
        return latest_checkpoint(self.output_dir) if wanted == "latest" else Path(wanted)

    def _check_same_start(self) -> None:
        steps = sorted(set(gather_object([self.progress.step])))
        if len(steps) > 1:
            raise UserError(
                f"--output_dir: the processes would go on from different steps ({steps}); "
                f"{self.accelerator.num_processes} processes need one directory that all of them "
                "can read"
            )

    def begin(self, models: Models, loader: PairLoader, update: Update) -> None:
        """Take over what was built, and write config.json."""
        self.models, self.loader, self.update = models, loader, update
        self.__dict__.pop("training", None)
        guard = self.config.safeguard
        if guard.over_parameters:
            self.gradients = BranchGradients(
                models.base.family,
                self.accelerator,
                models.unet,
                guard.winner_preserving_mu,
                self.config.model.lora_dropout > 0,
            )
            self.one_scale_a_step = guard.scope == "batch"
        if self.resume_from:
            log.info("resuming from %s", self.resume_from)
            if self.progress.step >= loader.max_train_steps:
                log.info(
                    "step %d of %d is done: nothing is trained, the model is written again",
                    *(self.progress.step, loader.max_train_steps),
                )
        if self.accelerator.is_main_process:
            self._compare_data()
            resolved = self._resolved()
            write_config(self.output_dir, describe_run(self.config, resolved))
            log.info("%s", resolved)
        plain = (bool, int, float, str)
        flags = self.config.flags()
        # Trackers store plain values; others are given as text.
        flags = {k: v if isinstance(v, plain) else str(v) for k, v in flags.items()}
        self.accelerator.init_trackers(self.config.run.tracker_project_name, config=flags)

    def _compare_data(self) -> None:
        """Describe the pairs, and say where they are not those of the checkpoint to go on from."""
        self.data = describe_pairs(self.loader.source)
        before = read_state(self.resume_from).get("data") if self.resume_from else None
        changed = changes(before, self.data) if before and self.data else None
        if changed:
            log.warning("the data is not what %s was trained on: %s", self.resume_from, changed)

    def _resolved(self) -> dict[str, Any]:
        config, models, loader = self.config, self.models, self.loader
        return {
            "family": models.base.family.name,
            "processes": self.accelerator.num_processes,
            "sharding": "FSDP2" if self.sharding else None,
            "device": str(self.device),
            "pairs": None if config.data.streaming else len(loader.source),
            "pairs_per_step": loader.stride * config.optim.gradient_accumulation_steps,
            "learning_rate": self.update.learning_rate,
            "fused_optimizer": bool(self.update.optimizer.param_groups[0].get("fused")),
            "max_train_steps": loader.max_train_steps,
            "unet_parameters": models.parameters,
            "trainable_parameters": sum(p.numel() for p in self.update.parameters),
            "resumed_from": str(self.resume_from) if self.resume_from else None,
        }

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Save the steps that are done where an error ends the run. Where not all processes have
        it the main one does so alone, the others may be gone; weights that are divided among them
        can then not be saved."""
        try:
            self._save_at_error(error)
            if error is not None and disk_is_full(error):
                clear_unfinished(self.output_dir)
                raise UserError(f"--output_dir: {full_disk(self.output_dir, error)}") from error
        finally:
            self.lock.release()

    def _save_at_error(self, error: BaseException | None) -> None:
        unsaved = error is not None and self.progress.step > self.begun_at
        if not unsaved or self.update.under_way:
            return
        shared = isinstance(error, SharedError)
        if not shared and (self.sharding or not self.accelerator.is_main_process):
            return
        try:
            if shared:
                self._save_unless_nonfinite()
            elif self._sound():
                self._write(self.update.state(keep=True))
        except Exception as also:  # the first error is the one to tell
            log.warning("step %d could not be saved: %s", self.progress.step, first_line(also))

    def steps(self) -> Iterator[Step]:
        """Give one step after another, up to the run's last or until a signal asks to stop; what
        `after` does between them is seen on a bar and in the logs."""
        main = self.accelerator.is_main_process
        self.stop = StopRequest()
        self.run_log = RunLog(self.output_dir, self.progress.step) if main else None
        self.bar = tqdm(
            total=self.loader.max_train_steps,
            initial=self.progress.step,
            desc=f"training {self.output_dir.resolve().name}",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        batches = SharedBatches(iter(self.loader), self)
        self.models.unet.train()
        if self.progress.step == 0:
            self._draw_samples()
        try:
            with logging_redirect_tqdm():
                while self.progress.step < self.loader.max_train_steps:
                    step = Step(self, batches)
                    yield step
                    if step.stop:
                        break
        finally:
            self.bar.close()
            if self.run_log:
                self.run_log.close()

    def after(self, step: Step) -> None:
        """Log a step that was done, save and draw where it is time to."""
        if self.models.cached_errors is not None:
            self.models.cached_errors.write()
        if step.cut_off:
            return
        self.progress, entry = step.progress, step.entry
        self.update.under_way = False
        if self.run_log:
            self.run_log.write(entry)
            track(self.accelerator, entry, self.models.encoder.process.bin_names(BINS))
        self.bar.update()
        self.bar.set_postfix(
            loss=f"{entry['loss']:.4f}",
            drift=f"{entry['winner_drift']:+.1e}",
            acc=f"{entry['implicit_acc']:.2f}",
        )
        if step.stop:
            return
        if self.progress.step % self.config.run.checkpointing_steps == 0:
            self._save_unless_nonfinite()
        if self.progress.step % self.config.run.validation_steps == 0:
            self._draw_samples()

    def finish(self) -> int:
        """Save, and after the last step export; returns the exit code, 0 when all steps are
        done and, with --push_to_hub, the upload too.

        Raises:
            UserError: the last steps were not finite, or the weights are not.
        """
        code = 0
        if self.progress.step >= self.loader.max_train_steps:
            if not self._sound():
                kept = latest_checkpoint(self.output_dir)
                raise UserError(
                    f"the run ends in {self.update.nonfinite_in_a_row} steps whose loss or "
                    "gradient was not finite, or its weights are not: they are not saved; lower "
                    "--learning_rate or --beta_dpo, or let --max_train_steps end the run before; "
                    f"the last good checkpoint is {kept or 'none'}"
                )
            self.save()
            finished = gathered(self.models, self.accelerator)
            if finished:
                for exported in export_run(self.output_dir, finished):
                    log.info("wrote %s", exported)
                code = self._publish()
        else:
            self._save_unless_nonfinite()
            log.warning("stopped by a signal after step %d", self.progress.step)
            code = self.stop.exit_code
        self.accelerator.end_training()
        return code

    def _publish(self) -> int:
        """Write the card and, with --push_to_hub, upload; returns the exit code, 1 where that
        failed."""
        if card := write_run_card(self.output_dir):
            log.info("wrote %s", card)
        hub = self.config.run
        return push_or_tell(of_run(self.output_dir), hub) if hub.push_to_hub else 0

    def _save_unless_nonfinite(self) -> None:
        if self.progress.step > 0 and self._sound():
            self.save()

    def _sound(self) -> bool:
        """Whether the weights are worth keeping. Amid non-finite steps they may already be bad: the
        last good checkpoint stays last. Called by every process where weights are divided."""
        finite = all(whole(p.detach().isfinite().all()) for p in self.update.parameters)
        return self.update.nonfinite_in_a_row == 0 and finite

    def save(self) -> None:
        """Write a checkpoint. Called by every process; the main one writes, the others wait."""
        self._write(self.update.state(keep=self.accelerator.is_main_process))
        self.accelerator.wait_for_everyone()

    def _write(self, training: dict[str, Any]) -> None:
        models = gathered(self.models, self.accelerator)
        if models is not None:
            save_checkpoint(self.config, self.progress, models, training, self.data)

    def _draw_samples(self) -> None:
        if not self.config.run.validation_prompts:
            return
        models = gathered(self.models, self.accelerator)
        if models is not None:
            from sdpo.training.samples import draw_grid

            unet = models.unet.to(self.device).eval()
            with self.accelerator.autocast():
                draw_grid(self.config, models, unet, self.accelerator, self.progress.step)
            unet.train()
        self.accelerator.wait_for_everyone()


def _refuse(refusal: str | None) -> None:
    """Raise on every process what one of them has to say."""
    refusals = [said for said in gather_object([refusal]) if said]
    if refusals:
        raise UserError(refusals[0])

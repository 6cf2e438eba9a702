"""From a step's losses to new weights: gradients accumulated, averaged over processes and clipped,
the optimizer's step, the learning rate's, the moving average's."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.training.checkpoint_paths import latest_checkpoint
from sdpo.training.optim import build_optimizer, build_scheduler, restore, scaled_learning_rate
from sdpo.training.sharding import whole

if TYPE_CHECKING:
    from torch import Tensor

    from sdpo.config import TrainConfig
    from sdpo.training.state import Models, Session
    from sdpo.training.step import Step

log = logging.getLogger(__name__)


class Update:
    """Optimizer and schedule of a run, restored where it goes on from a checkpoint.

    Raises:
        UserError: the checkpoint's state does not fit, or the optimizer's package is missing.
    """

    def __init__(
        self, config: TrainConfig, models: Models, max_train_steps: int, run: Session
    ) -> None:
        self.config, self.models, self.accelerator = config.optim, models, run.accelerator
        self.output_dir = run.output_dir
        self.parameters = models.trainable
        processes = run.accelerator.num_processes
        self.learning_rate = scaled_learning_rate(config.optim, processes)
        optimizer = build_optimizer(self.parameters, config.optim, self.learning_rate)
        self.scheduler = build_scheduler(optimizer, config.optim, max_train_steps)
        self.optimizer: Any = run.accelerator.prepare(optimizer)
        if run.resume_from:
            restore(self.optimizer, self.scheduler, run.training)
            if self.accelerator.scaler is not None and "scaler" in run.training:
                self.accelerator.scaler.load_state_dict(run.training["scaler"])
        self.nonfinite_in_a_row = self.nonfinite_steps = 0
        self.under_way = False  # from before the optimizer's step until the run has moved on

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Open a micro-batch's forward and backward pass: processes exchange gradients in the
        step's last one alone."""
        return nullcontext() if last else self.accelerator.no_sync(self.models.unet)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss, (), to the step's mean."""
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def apply(self, step: Step) -> None:
        """Clip (not Adafactor's gradient: that bounds its own updates, and the official code leaves
        it), step the optimizer unless loss or gradient is not finite, and close the step. A step
        that a signal cut off is dropped. Called by every process.

        Raises:
            UserError: more than --max_nonfinite_steps steps in a row were not finite.
        """
        if step.cut_off:
            self.optimizer.zero_grad(set_to_none=True)
            return
        limit = math.inf if self.config.use_adafactor else self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        grad_norm = float(whole(norm))
        loss = step.reduce()
        self.under_way = True
        self._step(step.number, loss, grad_norm)
        rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        step.close(lr=rate, grad_norm=grad_norm, nonfinite_steps=self.nonfinite_steps)

    def _step(self, number: int, loss: float, grad_norm: float) -> None:
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        scaler = self.accelerator.scaler
        # In fp16 the gradient scaler itself skips an overflow and lowers its scale; while the scale
        # is still above 1 that is how it finds its value, not a fault.
        searching = scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1.0
        if finite or scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.models.ema and finite and not self.optimizer.step_was_skipped:
            self.models.ema.update()
        if finite:
            self.nonfinite_in_a_row = 0
            return
        if searching:
            return
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        log.warning("step %d skipped: loss %s, gradient norm %s", number, loss, grad_norm)
        if self.nonfinite_in_a_row > self.config.max_nonfinite_steps:
            kept = latest_checkpoint(self.output_dir)
            raise UserError(
                f"loss or gradient was not finite in {self.nonfinite_in_a_row} steps in a row "
                f"(--max_nonfinite_steps {self.config.max_nonfinite_steps}): lower --learning_rate "
                "or --beta_dpo, or use --mixed_precision bf16 or no; the last good checkpoint is "
                f"{kept or 'none yet'}"
            )

    def state(self, keep: bool) -> dict[str, Any]:
        """Gather the state dicts of optimizer, schedule and, in fp16, gradient scaler. Called by
        every process; without `keep` the result is of no use and takes no memory."""
        found = {
            "optimizer": whole(self.optimizer.state_dict(), keep=keep),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.accelerator.scaler is not None:
            found["scaler"] = self.accelerator.scaler.state_dict()
        return found

"""Ask the frozen reference, or what is kept of it, about a micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sdpo.losses.terms import branch_errors
from sdpo.models.forward import predict_reference

if TYPE_CHECKING:
    from sdpo.training.state import Session
    from sdpo.training.step import MicroBatch


def ask_reference(run: Session, micro: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
    """Ask a run's frozen reference about B pairs.

    Returns:
        Its output, (2B, C, h, w), and None; with --cache_reference None and its errors, (2B,).
    """
    models, inputs = run.models, micro.inputs

    def output() -> Tensor:
        assert models.reference is not None
        autocast = run.accelerator.autocast()
        return predict_reference(models.base.family, models.reference, inputs, autocast)

    if models.cached_errors is None:
        return output(), None
    errors = models.cached_errors.of(micro.keys, lambda: branch_errors(output(), inputs.target))
    return None, errors.to(run.device)

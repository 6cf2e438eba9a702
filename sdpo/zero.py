"""DeepSpeed's ZeRO, stage 2, where it is installed: its engine divides gradients and AdamW's state
over the processes; every process keeps the weights whole.

The engine takes over from the backward pass to the optimizer's step. Forward passes go through the
UNet itself, and what is saved and loaded is whole, in the files and formats of any other run.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# AdamW's state of one parameter, beside the number of its steps.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroOptimizer(torch.optim.Optimizer):
    """An AdamW whose state the engine divides; to its users it is one like any other.

    Its parameter groups are those of the whole weights, and the learning rates in them count. It
    makes its step in `ZeroAccumulation.clip`, since the engine clips and steps at once.
    """

    def __init__(
        self, unet: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
    ) -> None:
        """Args:
        unet: on the process's device, its weights as training is to go on from them.
        optimizer: of what is trained of it; the engine takes it.
        """
        import deepspeed

        (group,) = optimizer.param_groups
        super().__init__([{**group, "params": list(group["params"])}], optimizer.defaults)
        trained = sum(p.numel() for p in group["params"])
        settings = {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
            # The engine keeps a buffer of so many numbers, by default 2 GB for the tiniest model.
            "zero_optimization": {"stage": 2, "reduce_bucket_size": min(trained, 500_000_000)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        self.engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=settings)
        self.divided = optimizer

    def engine_step(self) -> float:
        """Clip and step, or skip a step whose gradient is not finite; returns its norm before."""
        (mine,), (group,) = self.param_groups, self.divided.param_groups
        group["lr"] = mine["lr"]
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def step(self, closure: None = None) -> None:
        """Nothing: it is made already."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: the engine does it."""

    def state_dict(self) -> dict[str, Any]:
        """That of an AdamW of the whole weights. Called by every process; its tensors are on the
        CPU, and on the main process alone."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = super().state_dict()["param_groups"]
        if not self.divided.state:
            return {"state": {}, "param_groups": groups}
        (own,) = self.divided.state.values()
        main = torch.distributed.get_rank() == 0
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            found = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
            if main:
                state[number] = {name: value.cpu() for name, value in found.items()}
                state[number]["step"] = own["step"].cpu().clone()
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` or an AdamW gave; groups are left as they are."""
        from deepspeed.utils import safe_set_full_optimizer_state

        state = state_dict["state"]
        if not state:
            return
        # The engine has a state to put this in only after a step: one at rate 0 without a gradient
        # moves nothing.
        for group in self.divided.param_groups:
            group["lr"] = 0.0
        parameters = self.param_groups[0]["params"]
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(sum((0.0 * p).sum() for p in parameters), scale_wrt_gas=False)
        self.engine.step()
        for number, parameter in enumerate(parameters):
            for name in _MOMENTS:
                value = state[number][name].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, name)
        for own in self.divided.state.values():
            own["step"].fill_(float(state[0]["step"]))


class ZeroAccumulation:
    """The engine's: gradients are divided as they arise."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self.optimizer, self.engine = optimizer, optimizer.engine

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Tells the engine where the step ends."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """By the engine."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip(self) -> float:
        """The optimizer's step as well; the norm is infinite where it was skipped."""
        return self.optimizer.engine_step()

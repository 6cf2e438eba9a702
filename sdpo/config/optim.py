"""Steps, optimizer, learning rate, number formats and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdpo.common.flags import ABOVE_ZERO, BELOW_ONE, NOT_NEGATIVE, at_least, flag

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


@dataclass(frozen=True)
class OptimConfig:
    """How many pairs a step takes, and what a step does with their gradient."""

    train_batch_size: int = flag(1, "pairs per process", metavar="PAIRS", check=at_least(1))
    gradient_accumulation_steps: int = flag(
        1, "micro-batches of a step", metavar="N", check=at_least(1)
    )
    num_train_epochs: int | None = flag(
        None,
        "passes over the data, instead of --max_train_steps",
        metavar="N",
        check=at_least(1),
        replaces="max_train_steps",
    )
    max_train_steps: int | None = flag(
        None,
        "optimizer steps",
        metavar="N",
        check=at_least(1),
        replaces="num_train_epochs",
        shown="2000",
    )
    learning_rate: float = flag(1e-8, "optimizer's rate", metavar="LR", check=ABOVE_ZERO)
    scale_lr: bool = flag(
        False, "multiply the rate by processes x batch x accumulation (a rate per pair)"
    )
    lr_scheduler: str = flag(
        "constant_with_warmup", "the rate's course over the steps", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int = flag(
        500, "steps in which the rate rises", metavar="N", check=NOT_NEGATIVE
    )
    use_adafactor: bool = flag(False, "Adafactor instead of AdamW (less memory)")
    adam_beta1: float = flag(0.9, "AdamW's decay of the first moment", check=BELOW_ONE)
    adam_beta2: float = flag(0.999, "AdamW's decay of the second moment", check=BELOW_ONE)
    adam_weight_decay: float = flag(1e-2, "AdamW's and Adafactor's", check=NOT_NEGATIVE)
    adam_epsilon: float = flag(1e-8, "AdamW's", check=ABOVE_ZERO)
    max_grad_norm: float = flag(
        1.0,
        "norm to which a step's gradient is clipped; not with --use_adafactor",
        check=ABOVE_ZERO,
    )
    gradient_checkpointing: bool = flag(False, "less memory, slower backward pass")
    channels_last: bool = flag(
        False,
        "keep the convolutions' weights and images in channels-last order (faster where the "
        "convolution kernels want it, as with half precision on NVIDIA GPUs)",
    )
    compile: bool = flag(
        False,
        "torch.compile UNet and reference: minutes at the start, faster steps afterwards",
    )
    fused_optimizer: bool | None = flag(
        None, "AdamW in one kernel over all weights", shown="where torch has one for the weights"
    )
    use_8bit_adam: bool = flag(
        False,
        "AdamW with 8-bit moments (a quarter of the optimizer's memory); needs bitsandbytes",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "no", "number format of forward and backward pass", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "TF32 matrix products on NVIDIA GPUs")
    max_nonfinite_steps: int = flag(
        10,
        "stop after more than N steps in a row with a non-finite loss or gradient",
        metavar="N",
        check=at_least(1),
    )

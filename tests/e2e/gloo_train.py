"""train.py whose processes exchange by gloo: NCCL refuses two of them on one card."""

from __future__ import annotations

from functools import partial

from accelerate.utils import InitProcessGroupKwargs

import sdpo.training.accelerator
from sdpo.common.errors import run_main
from train import main

if __name__ == "__main__":
    by_gloo = partial(InitProcessGroupKwargs, backend="gloo")
    sdpo.training.accelerator.InitProcessGroupKwargs = by_gloo
    run_main(main, "train.py")

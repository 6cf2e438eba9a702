"""train.py, one optimizer step whenever a line arrives on standard input (see `common.Worker`).

    python scripts/bench/train_worker.py [--public_style] train.py's flags...

It is train.py's own `main` with its own flags; only the moment at which a step begins is decided
outside. It ends when its standard input does, before the last step, so that nothing is saved.
"""

from __future__ import annotations

import sys
from typing import Any

from sdpo.common.errors import run_main

PUBLIC_STYLE = "--public_style"


def take_turns(step: Any) -> Any:
    """`step` of the trainer, begun by a line on standard input and answered by its metrics."""
    from scripts.bench.common import answer

    def waiting(trainer: Any, batches: Any) -> Any:
        if trainer.progress.step == 0:
            answer({"ready": True})
        if not sys.stdin.readline():
            sys.exit(0)
        entry = step(trainer, batches)
        answer({k: v for k, v in entry.items() if isinstance(v, int | float)})
        return entry

    return waiting


def main() -> int:
    """Train until nobody asks for more."""
    public_style = sys.argv[1:2] == [PUBLIC_STYLE]
    sys.argv[1:] = sys.argv[1 + public_style :]
    from scripts.bench.public_style import public_step
    from sdpo.training.run import Trainer

    Trainer.step = take_turns(public_step if public_style else Trainer.step)
    import train

    return train.main()


if __name__ == "__main__":
    run_main(main, "train.py")

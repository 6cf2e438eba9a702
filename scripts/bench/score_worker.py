"""eval/score.py with its own flags, which counts the images it decodes and times itself.

    python scripts/bench/score_worker.py eval/score.py's flags...

The last line of its output is JSON: images decoded, seconds of main() after the imports.
"""

from __future__ import annotations

import time
from typing import Any

from sdpo.common.errors import run_main


def main() -> int:
    """Score and report."""
    import sdpo.evaluation.score.scoring
    from scripts.bench.common import answer
    from sdpo.evaluation.score import run as score

    decoded = 0
    open_image = sdpo.evaluation.score.scoring.open_image

    def counted(*args: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return open_image(*args)

    sdpo.evaluation.score.scoring.open_image = counted
    began = time.perf_counter()
    code = score.main()
    answer({"decoded": decoded, "seconds": time.perf_counter() - began})
    return code


if __name__ == "__main__":
    run_main(main, "score.py")

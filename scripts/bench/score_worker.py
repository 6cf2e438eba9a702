"""eval/score.py with its own flags, which says how many images it decoded and how long it took.

    python -m scripts.bench.score_worker eval/score.py's flags...

The last line of its output is JSON: images decoded, seconds of main() after the imports.
"""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stderr

from scripts.bench.common import answer
from sdpo.common.errors import run_main


def main() -> int:
    """Score and report; how many images were decoded is read from score.py's own bar."""
    import sdpo.evaluation.score.scoring  # noqa: F401
    from sdpo.evaluation.score import run

    began = time.perf_counter()
    with redirect_stderr(io.StringIO()) as bars:
        code = run.main()
    decoded = re.findall(r"decoding: 100%.* (\d+)/\d+ \[", bars.getvalue())
    answer({"decoded": sum(map(int, decoded)), "seconds": time.perf_counter() - began})
    return code


if __name__ == "__main__":
    run_main(main, "score.py")

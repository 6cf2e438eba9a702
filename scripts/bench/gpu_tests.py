"""The tests marked `gpu`, run by gpu.py: their process, and what pytest's output says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.bench.common import ROOT

OUTCOME = re.compile(
    r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\))? *(?:\[.*)?$", re.MULTILINE
)
BAD = ("FAILED", "ERROR")
SUMMARY = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - (.+))?$", re.MULTILINE)
COLLECTED = re.compile(r"^collect.*?(\d+) items?(?:.* (\d+) selected)?", re.MULTILINE)
BEGUN = re.compile(r"^(\S+::\S.*?) *$", re.MULTILINE)


class Tests:
    """A process of pytest, which writes into `output`. It is pytest's own group: what it starts is
    ended with it.

    Attributes:
        process: None where pytest is not installed.
    """

    def __init__(self, names: Sequence[str], device: str, output: Path) -> None:
        """Start it.

        Args:
            names: of the tests, by default all that are marked.
            device: as SDPO_TEST_DEVICE takes it.
        """
        self.output, self.process = output, None
        if find_spec("pytest") is None:
            return
        # Those of losses before those of runs, of which the last take longest.
        files = sorted((ROOT / "tests").rglob("test_*.py"), reverse=True)
        marked = [str(f) for f in files if "pytest.mark.gpu" in f.read_text(encoding="utf-8")]
        options = ["-vv", "-rfE", "-m", "gpu", "-p", "no:cacheprovider"]
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *(names or marked)],
                cwd=ROOT,
                env={**os.environ, "SDPO_TEST_DEVICE": device, "COLUMNS": "200"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, limit: float) -> dict[str, Any]:
        """Wait for its end, so many seconds at most; returns what it says, and its exit code, None
        where time ran out."""
        if self.process is None:
            return {"left_out": "pytest is not installed"}
        try:
            code: int | None = self.process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return {"exit_code": code, **read(self.output.read_text("utf-8", errors="replace"))}


def read(text: str) -> dict[str, Any]:
    """Read pytest's verbose output: how many passed; which were skipped and which failed, and why;
    of how many nothing is said, and the first of these, which was under way, where it is known."""
    outcomes = {name: (outcome, why) for name, outcome, why in OUTCOME.findall(text)}
    said = dict(SUMMARY.findall(text))
    failed = {name: said.get(name, "") for name, (outcome, _) in outcomes.items() if outcome in BAD}
    # A file that could not be imported has no outcome.
    failed |= {name: why for name, why in said.items() if "::" not in name}
    collected = COLLECTED.search(text)
    count = int(collected[2] or collected[1]) if collected else 0
    under_way = [line for line in BEGUN.findall(text) if not OUTCOME.match(line)]
    return {
        "passed": sum(outcome == "PASSED" for outcome, _ in outcomes.values()),
        "skipped": {name: why for name, (outcome, why) in outcomes.items() if outcome == "SKIPPED"},
        "failed": failed,
        "not_run": max(0, count - len(outcomes)),
        "under_way": under_way[-1] if under_way else None,
    }

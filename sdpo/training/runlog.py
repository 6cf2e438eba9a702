"""What a run leaves behind: config.json, metrics.jsonl and the trackers' logs."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.common.files import write_json
from sdpo.common.jsonl import JsonLines

if TYPE_CHECKING:
    import torch

    from sdpo.config import TrainConfig

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "sdpo",
)
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
# What sdpo.evaluation.heldout adds.
HELDOUT_FILE = "heldout.jsonl"
HELDOUT_EMA_FILE = "heldout_ema.jsonl"


def describe_run(config: TrainConfig, resolved: dict[str, Any]) -> dict[str, Any]:
    """Describe a run: every flag, what was resolved from them, versions and the git revision."""
    return {
        "args": config.flags(),
        "resolved": resolved,
        "command": sys.argv,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far, GiB: the accelerator's, or on a CPU the process's resident set."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class RunLog(JsonLines):
    """Appends to metrics.jsonl, one line per optimizer step.

    On resuming after `keep_steps` steps, the lines of later steps (which will be done again) are
    dropped.
    """

    def __init__(self, output_dir: Path, keep_steps: int) -> None:
        self.path = output_dir / METRICS_FILE
        super().__init__(self.path, lambda entry: entry["step"] <= keep_steps)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry.

        Raises:
            UserError: the file was deleted, so that nobody would ever read what is written.
        """
        if not self.path.exists():
            raise UserError(
                f"--output_dir: {self.path} was deleted while the run went on; start it again"
            )
        super().write(entry)


def write_config(output_dir: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    write_json(output_dir / CONFIG_FILE, config)


def read_config(output_dir: Path) -> dict[str, Any]:
    """Read what `write_config` wrote.

    Raises:
        OSError: there is none.
        ValueError: it is not JSON.
    """
    config: dict[str, Any] = json.loads((output_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    return config

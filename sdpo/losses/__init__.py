"""Which methods exist, read from the folder, so that `--help` needs no torch."""

from __future__ import annotations

from pathlib import Path

METHODS_DIR = Path(__file__).resolve().parent
_NOT_METHODS = {"__init__", "preference", "safeguard", "terms"}


def method_names() -> list[str]:
    """The methods in `sdpo/losses/`, sorted: `diffusion_dpo.py` is "diffusion-dpo"."""
    stems = (path.stem for path in METHODS_DIR.glob("*.py"))
    return sorted(stem.replace("_", "-") for stem in stems if stem not in _NOT_METHODS)

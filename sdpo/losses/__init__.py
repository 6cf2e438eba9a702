"""Preference losses, one file per method; which there are is read from the folder, so that
`--help` needs no torch.

A method is a module of this package that defines `loss(terms: PairTerms) -> Tensor` (a scalar, the
mean over pairs); options that it alone takes are keyword-only parameters of that function with
defaults. It is known by its file name: `diffusion_dpo.py` is `diffusion-dpo`. Adding one is
adding that file. A module may set `USES_LOSERS = False` when losers get no gradient, and must set
`USES_REFERENCE_OUTPUT = True` when its loss asks for `terms.ref_w`.
"""

from __future__ import annotations

import re
from pathlib import Path

# DSPO's forms, one per base model's family.
FORMS = ("sd15", "sdxl")
METHODS_DIR = Path(__file__).resolve().parent
_NOT_METHODS = {"__init__", "preference", "safeguard", "terms"}


def method_names() -> list[str]:
    """List the methods in `sdpo/losses/`, sorted: `diffusion_dpo.py` is "diffusion-dpo"."""
    stems = (path.stem for path in METHODS_DIR.glob("*.py"))
    return sorted(stem.replace("_", "-") for stem in stems if stem not in _NOT_METHODS)


def needs_reference_output(name: str) -> bool:
    """Say whether the loss of a method in `method_names()` asks for more of the reference than its
    errors. Read from the file's text, since importing it takes torch."""
    text = (METHODS_DIR / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return re.search(r"^USES_REFERENCE_OUTPUT = True$", text, re.MULTILINE) is not None

"""Command lines whose mistakes are one sentence, as every other mistake."""

from __future__ import annotations

import argparse
from typing import Any

from sdpo.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose errors are `UserError`s."""

    def __init__(self, prog: str, description: str | None, **kwargs: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        """Instead of the usage and an exit: one sentence.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} (see --help)")


def as_argv(flags: dict[str, Any]) -> list[str]:
    """Make a command line: True gives a switch, None and False leave a flag out, a list gives
    several values."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list | tuple):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            argv += [f"--{name}", str(value)]
    return argv

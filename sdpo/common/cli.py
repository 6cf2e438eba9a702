"""Command lines whose mistakes are one sentence, as every other mistake."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
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
        raise UserError(f"{message}{self._meant(message)} (see --help)")

    def _meant(self, message: str) -> str:
        """Name flags that are like an unknown one, or have its letters as initials (--lr)."""
        options = [option for action in self._actions for option in action.option_strings]
        flags = [option.removeprefix("--") for option in options if option.startswith("--")]
        like: list[str] = []
        for word in message.partition("unrecognized arguments: ")[2].split():
            if word.startswith("--"):
                given = word.removeprefix("--").partition("=")[0]
                like += get_close_matches(given, flags, 1)
                like += [flag for flag in flags if len(given) > 1 and given == _initials(flag)]
        named = " or ".join(f"--{flag}" for flag in dict.fromkeys(like))
        return f"; did you mean {named}?" if named else ""


def _initials(flag: str) -> str:
    return "".join(word[:1] for word in flag.split("_"))


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

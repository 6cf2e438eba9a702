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


class Replace(argparse.Action):
    """Of two flags that exclude each other the last one given counts, so that arguments added to a
    recipe can replace its own."""

    EXCLUDES = {  # noqa: RUF012
        "dataset_name": "train_data_dir",
        "train_data_dir": "dataset_name",
        "max_train_steps": "num_train_epochs",
        "num_train_epochs": "max_train_steps",
    }

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, self.EXCLUDES[self.dest], None)


def at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Refuse numbers that are too small; a flag that was not given (None) is none.

    Raises:
        UserError: naming the flag.
    """
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")


def as_argv(flags: dict[str, Any]) -> list[str]:
    """A command line: True gives a switch, None and False leave a flag out, a list gives several
    values."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif isinstance(value, list | tuple):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            argv += [f"--{name}", str(value)]
    return argv

"""How a user's mistake is reported: one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can put right; the message names what is wrong and what would be right."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for use inside one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_main(main: Callable[[], int | None], program: str) -> None:
    """Run `main` and exit; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C one and
    the shell's code for it."""
    try:
        code = main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)

"""`python -m sdpo.lab COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from sdpo.common.errors import UserError, run_main

COMMANDS = {
    "audit": "what an update would do to the winners at a checkpoint, and the method's assumptions",
    "tiny": "all of the lab's questions on the tiny world, and a page of what was found",
    "sweep": "training runs over settings and seeds from one YAML file, measured and drawn",
    "quickstart": "the same training without and with the safeguard on the tiny world, compared",
    "plot": "curves of any runs side by side",
}


def main(argv: Sequence[str]) -> int:
    """Hand over to the command named first; returns its exit code.

    Raises:
        UserError: there is none of that name, or it refuses its flags.
    """
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        print("python -m sdpo.lab COMMAND ...\n")
        for command, about in COMMANDS.items():
            print(f"  {command:10} {about}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name or 'no command'}: give one of {', '.join(COMMANDS)}")
    module = import_module("sdpo.lab.plot" if name == "plot" else f"sdpo.lab.{name}.run")
    code: int = module.main(rest)
    return code


if __name__ == "__main__":
    # Errors of the quickstart have its own name.
    program = "quickstart" if sys.argv[1:2] == ["quickstart"] else "sdpo.lab"
    run_main(lambda: main(sys.argv[1:]), program)

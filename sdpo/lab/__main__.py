"""`python -m sdpo.lab COMMAND ...`."""

from __future__ import annotations

import sys
from importlib import import_module

from sdpo.common.errors import UserError, run_main

COMMANDS = {
    "audit": "what an update would do to the winners at a checkpoint, and the method's assumptions",
    "tiny": "all of the lab's questions on the tiny world, and a page of what was found",
    "sweep": "training runs over settings and seeds from one YAML file, measured and drawn",
}


def main() -> int:
    """Hand over to the command named first.

    Raises:
        UserError: there is none of that name.
    """
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("-h", "--help"):
        print("python -m sdpo.lab COMMAND ...\n")
        for command, about in COMMANDS.items():
            print(f"  {command:8} {about}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name or 'no command'}: give one of {', '.join(COMMANDS)}")
    return import_module(f"sdpo.lab.{name}.run").main(rest)


if __name__ == "__main__":
    run_main(main, "sdpo.lab")

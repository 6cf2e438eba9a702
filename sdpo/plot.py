"""The old name of `python -m sdpo.lab plot`, kept for one release."""

import sys

from sdpo.common.errors import run_main
from sdpo.lab.plot import main

if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), "sdpo.plot")

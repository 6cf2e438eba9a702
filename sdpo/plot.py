"""The old name of `sdpo.lab.plot`, kept for one release."""

from sdpo.common.errors import run_main
from sdpo.lab.plot import main

if __name__ == "__main__":
    run_main(main, "sdpo.plot")

"""The old name of `sdpo.lab.quickstart`, kept for one release."""

from sdpo.common.errors import run_main
from sdpo.lab.quickstart.run import main

if __name__ == "__main__":
    run_main(main, "quickstart")

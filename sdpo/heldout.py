"""The old name of `sdpo.evaluation.heldout`, kept for one release."""

from sdpo.common.errors import run_main
from sdpo.evaluation.heldout import main

if __name__ == "__main__":
    run_main(main, "sdpo.heldout")

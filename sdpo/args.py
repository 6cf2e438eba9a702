"""The old name of `train.py --check_only`, kept for one release."""

import sys

from sdpo.common.errors import run_main
from sdpo.config import parse_train
from sdpo.training.places import check_places


def main() -> int:
    """Check flags and paths."""
    check_places(parse_train(sys.argv[1:]))
    return 0


if __name__ == "__main__":
    run_main(main, "train.py")

"""The old name of `train.py --check_only`, kept for one release."""

import sys

from sdpo.common.errors import run_main
from sdpo.config import parse_train
from sdpo.training.places import check_places

if __name__ == "__main__":
    run_main(lambda: check_places(parse_train(sys.argv[1:])), "train.py")

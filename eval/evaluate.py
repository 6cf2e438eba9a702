"""Generate every suite and score it: `python eval/evaluate.py --unet unet.pth`
(sdpo.evaluation.evaluate)."""

from sdpo.common.errors import run_main
from sdpo.evaluation.evaluate import main

if __name__ == "__main__":
    run_main(main, "evaluate.py")

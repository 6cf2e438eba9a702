"""Generate a suite's images: `python eval/generate.py --unet unet.pth`
(sdpo.evaluation.generate.run)."""

from sdpo.common.errors import run_main
from sdpo.evaluation.generate.run import main

if __name__ == "__main__":
    run_main(main, "generate.py")

"""Score generated images: `python eval/score.py MANIFEST.json ...` (sdpo.evaluation.score.run)."""

from sdpo.common.errors import run_main
from sdpo.evaluation.score.run import main

if __name__ == "__main__":
    run_main(main, "score.py")

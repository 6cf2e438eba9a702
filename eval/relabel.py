"""Label preference pairs by a scorer: `python eval/relabel.py --choice_model pickscore`
(sdpo.evaluation.score.relabel)."""

from sdpo.common.errors import run_main
from sdpo.evaluation.score.relabel import main

if __name__ == "__main__":
    run_main(main, "relabel.py")

"""Compare models by win rates: `python eval/compare.py --json_a A.json --json_b B.json`
(sdpo.evaluation.compare.run)."""

from sdpo.common.errors import run_main
from sdpo.evaluation.compare.run import main

if __name__ == "__main__":
    run_main(main, "compare.py")

"""Build the published prompt suites: `python prompts/build.py papv2`
(sdpo.evaluation.generate.published)."""

from sdpo.common.errors import run_main
from sdpo.evaluation.generate.published import main

if __name__ == "__main__":
    run_main(main, "build.py")

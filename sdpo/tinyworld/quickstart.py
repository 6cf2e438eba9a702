"""The old name of `python -m sdpo.lab quickstart`, kept for one release.

It is named, not imported: the tiny world knows nothing of the lab.
"""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "quickstart")
    runpy.run_module("sdpo.lab", run_name="__main__", alter_sys=True)

"""The old name of `sdpo.data.latents`, kept for one release."""

from sdpo.common.errors import run_main
from sdpo.data.latents.__main__ import main

if __name__ == "__main__":
    run_main(main, "sdpo.cache")

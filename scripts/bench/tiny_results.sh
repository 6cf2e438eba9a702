#!/usr/bin/env bash
# The quickstart for every method and several seeds, as one table (about 5 minutes for each run of it).
# bash scripts/bench/tiny_results.sh [--methods diffusion-dpo dmpo] [--seeds 0 1 2] ...
set -euo pipefail
source "$(dirname "$0")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" scripts/bench/tiny_results.py "$@"

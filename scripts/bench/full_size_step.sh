#!/usr/bin/env bash
# The real training step at SD1.5's true size on this machine (about 18 GB of memory, 13 GB of disk).
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/full_size_step.py" "$@"

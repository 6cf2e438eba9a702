#!/usr/bin/env bash
# Pairs per second of 1, 2 and 4 processes on the CPU.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/scaling.py" "$@"

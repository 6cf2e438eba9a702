#!/usr/bin/env bash
# What the six recipes cost on 8 GPUs of 80 GB: computed, in seconds, nothing is trained.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/cost_model.py" "$@"

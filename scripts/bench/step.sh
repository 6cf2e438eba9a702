#!/usr/bin/env bash
# Time per optimizer step and peak memory of the plain step, of each option, and of a public-style one.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/step.py" "$@"

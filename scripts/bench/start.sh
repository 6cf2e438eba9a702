#!/usr/bin/env bash
# A run's start by phase, and how it grows with rows and steps.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/start.py" "$@"

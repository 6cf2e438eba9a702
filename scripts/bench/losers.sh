#!/usr/bin/env bash
# A step that trains on one loser in N.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/losers.py" "$@"

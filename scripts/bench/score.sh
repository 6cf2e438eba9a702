#!/usr/bin/env bash
# Five scorers in one pass against one process for each.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/score.py" "$@"

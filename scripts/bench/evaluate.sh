#!/usr/bin/env bash
# An evaluation scored while its images are made, against one scored afterwards.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/evaluate.py" "$@"

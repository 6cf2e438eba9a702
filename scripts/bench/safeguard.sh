#!/usr/bin/env bash
# The safeguard's cost in both scopes, alone and as a share of a step.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/safeguard.py" "$@"

#!/usr/bin/env bash
# Images one prompt at a time against several at once.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/generate.py" "$@"

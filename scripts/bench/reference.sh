#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "$0")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" scripts/bench/reference.py "$@"

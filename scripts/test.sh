#!/usr/bin/env bash
# Run the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_env.sh"
install_requirements requirements-dev.txt
cd "$ROOT"
# Tiny models run fastest on one thread each; pytest's workers use the cores.
export OMP_NUM_THREADS=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 "$@"

#!/usr/bin/env bash
# Run the fast half of the tests with the lowest versions that requirements.txt allows, in an
# environment of its own (.venv-lowest): bash scripts/test_lowest.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
ROOMS="tests/common tests/config tests/losses tests/models tests/data tests/training"
[ -x .venv-lowest/bin/python ] || "${SDPO_PYTHON:-python3}" -m venv .venv-lowest
PYTHON=$PWD/.venv-lowest/bin/python
"$PYTHON" -m pip install --quiet --disable-pip-version-check uv
# What the file does not name may be as new as it likes.
"$PYTHON" -m uv pip install --quiet --python "$PYTHON" --resolution lowest-direct \
  -r requirements-dev.txt
"$PYTHON" -m uv pip freeze --python "$PYTHON" |
  grep -iE '^(torch|diffusers|transformers|accelerate|peft|datasets|numpy|pillow)=='
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
# shellcheck disable=SC2086
exec "$PYTHON" -m pytest -n 2 $ROOMS "$@"

#!/usr/bin/env bash
# Correctness, speed and memory on one card, in at most nine minutes; installs nothing.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
export SDPO_SKIP_INSTALL=1
# Nobody waits for a hub that cannot be reached.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Without an environment of ours, the packages of the machine's own Python are what there is.
if [ -z "${SDPO_PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && ! [ -x "$here/../../.venv/bin/python" ]; then
  export SDPO_PYTHON=python3
fi
source "$here/../_env.sh"
exec "$PYTHON" "${AT}scripts/bench/gpu.py" "$@"

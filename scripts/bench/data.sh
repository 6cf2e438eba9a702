#!/usr/bin/env bash
# Pairs per second from Parquet, streaming and the latent cache.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}scripts/bench/data.py" "$@"

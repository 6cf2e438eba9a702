#!/usr/bin/env bash
# The main job on the embedded default: train a tiny Stable Diffusion without and with the safeguard.
# bash scripts/quickstart.sh [--method dspo] [--seed 1] ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_env.sh"
install_requirements requirements.txt
exec "$PYTHON" -m sdpo.lab quickstart "$@"

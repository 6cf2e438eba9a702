#!/usr/bin/env bash
# DMPO with the safeguard on SDXL: scripts/recipes/sdxl_dmpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

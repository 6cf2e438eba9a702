#!/usr/bin/env bash
# DMPO with the safeguard on SD1.5: scripts/recipes/sd15_dmpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

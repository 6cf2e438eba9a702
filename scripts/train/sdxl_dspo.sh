#!/usr/bin/env bash
# DSPO with the safeguard on SDXL.
set -euo pipefail
source "$(dirname "$0")/_recipe.sh"
train_sdxl --train_method dspo --beta_dpo 5000 --winner_preserving_mu 0.6 "$@"

#!/usr/bin/env bash
# DMPO with the safeguard on SDXL.
set -euo pipefail
source "$(dirname "$0")/_recipe.sh"
train_sdxl --train_method dmpo --beta_dpo 6000 --dmpo_alpha 0.01 --winner_preserving_mu 0.6 "$@"

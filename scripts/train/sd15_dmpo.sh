#!/usr/bin/env bash
# DMPO with the safeguard on SD1.5.
set -euo pipefail
source "$(dirname "$0")/_recipe.sh"
train_sd15 --train_method dmpo --beta_dpo 2000 --dmpo_alpha 0.01 --winner_preserving_mu 0.9 "$@"

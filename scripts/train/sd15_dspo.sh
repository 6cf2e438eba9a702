#!/usr/bin/env bash
# DSPO with the safeguard on SD1.5.
set -euo pipefail
source "$(dirname "$0")/_recipe.sh"
train_sd15 --train_method dspo --beta_dpo 0.001 --winner_preserving_mu 0.2 "$@"

#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on SD1.5.
set -euo pipefail
source "$(dirname "$0")/_recipe.sh"
train_sd15 --train_method diffusion-dpo --beta_dpo 5000 --winner_preserving_mu 0.9 "$@"

#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on PixArt-Sigma: all weights: scripts/recipes/pixart_sigma_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

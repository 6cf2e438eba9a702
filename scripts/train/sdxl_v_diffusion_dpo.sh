#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on an SDXL that predicts v: scripts/recipes/sdxl_v_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

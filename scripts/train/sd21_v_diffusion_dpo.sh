#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on SD2.1 at 768 px, which predicts v: scripts/recipes/sd21_v_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

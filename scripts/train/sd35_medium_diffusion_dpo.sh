#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on SD3.5 medium: LoRA: scripts/recipes/sd35_medium_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

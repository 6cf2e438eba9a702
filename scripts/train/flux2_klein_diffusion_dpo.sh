#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on FLUX.2 klein base: LoRA: scripts/recipes/flux2_klein_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

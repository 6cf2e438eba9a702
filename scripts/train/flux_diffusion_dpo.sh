#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on FLUX.1-dev: LoRA: scripts/recipes/flux_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

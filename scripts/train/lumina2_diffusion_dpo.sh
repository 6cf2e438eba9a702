#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on Lumina-Image 2.0: LoRA: scripts/recipes/lumina2_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on Qwen-Image: LoRA: scripts/recipes/qwen_image_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

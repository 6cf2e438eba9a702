#!/usr/bin/env bash
# Diffusion-DPO with the safeguard on Sana 1.5: LoRA: scripts/recipes/sana_diffusion_dpo.yaml, and any of train.py's flags.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_recipe.sh"
train "$@"

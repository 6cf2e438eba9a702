#!/usr/bin/env bash
# Encode images and captions ahead of training (train.py --cache_dir_latents does it too where it was
# not). Takes the flags of the training run as they are.
# bash scripts/data/cache_latents.sh --cache_dir_latents DIR --dataset_name yuvalkirstain/pickapic_v2 ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
source "$(dirname "$(readlink -f "$0")")/../_launch.sh"
# The mistakes of flags and paths are answered here, once, and not by every process.
"$PYTHON" -m sdpo.data.latents --check_only "$@" || exit
install_requirements requirements.txt
launch -m sdpo.data.latents "$@"

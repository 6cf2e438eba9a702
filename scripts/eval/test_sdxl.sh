#!/usr/bin/env bash
# Evaluate an SDXL UNet as published: three suites, 50 steps, five scorers, the fp16-fix VAE.
# bash scripts/eval/test_sdxl.sh unet.pth [--suites ...] [--outdir DIR] [--scorers ...] ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_evaluate.sh"
need_unet "$@"
evaluate --sdxl --unet "$@"

#!/usr/bin/env bash
# Evaluate an SD1.5 UNet as published: three suites, 50 steps, five scorers.
# bash scripts/eval/test_sd15.sh unet.pth [--suites ...] [--outdir DIR] [--scorers ...] ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_evaluate.sh"
need_unet "$@"
evaluate --unet "$@"

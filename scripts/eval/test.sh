#!/usr/bin/env bash
# Evaluate a denoiser of any base that is served: three suites, five scorers, the base's own pipeline and sampler.
# bash scripts/eval/test.sh --base ID_OR_PATH WEIGHTS [--suites ...] [--outdir DIR] [--scorers ...] ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_evaluate.sh"
usage="bash scripts/eval/test.sh --base ID_OR_PATH WEIGHTS [flags]"
[ "${1:-}" = --base ] && [ -n "${2:-}" ] || fail "give the base first: $usage"
base=$2
shift 2
case "${1:-}" in
  "" | -*) fail "give the weights after the base: $usage; or \`base\` for the unaligned model" ;;
esac
evaluate --pretrained_model_name_or_path "$base" --pretrained_vae_model_name_or_path base --unet "$@"

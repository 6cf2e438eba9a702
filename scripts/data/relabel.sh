#!/usr/bin/env bash
# Label pairs by a scorer ahead of training (train.py --choice_model does it too where it was not).
# bash scripts/data/relabel.sh --choice_model pickscore --dataset_name yuvalkirstain/pickapic_v2 ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
source "$(dirname "$(readlink -f "$0")")/../_launch.sh"
# The mistakes of flags and paths are answered here, once, and not by every process.
"$PYTHON" "${AT}eval/relabel.py" --check_only "$@" || exit
install_requirements requirements.txt
launch "${AT}eval/relabel.py" "$@"

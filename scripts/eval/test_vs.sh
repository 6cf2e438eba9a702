#!/usr/bin/env bash
# Win rates of model A over model B from their manifests, and a page to read them on.
# bash scripts/eval/test_vs.sh --json_a A.json --json_b B.json --label_a a --label_b b [...]
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
install_requirements requirements.txt
exec "$PYTHON" "${AT}eval/compare.py" "$@"

#!/usr/bin/env bash
# The questions about the method, each with a figure, on the tiny world: output/lab/report.html.
# bash scripts/lab.sh [--out DIR] ...
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_env.sh"
install_requirements requirements.txt
exec "$PYTHON" -m sdpo.lab tiny --sweeps "${AT}scripts/lab" "$@"

#!/usr/bin/env bash
# Makes assets/tiny-sd15 and assets/tiny-sdxl from scratch. Arguments are passed on, e.g. --seed 1.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/_env.sh"
install_requirements requirements.txt
exec "$PYTHON" -m sdpo.tinyworld.pretrain --out "${AT}assets" "$@"

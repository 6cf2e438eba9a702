#!/usr/bin/env bash
# Makes assets/tiny-sd15 and assets/tiny-sdxl from scratch. Arguments are passed on, e.g. --seed 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m sdpo.tinyworld.pretrain "$@"

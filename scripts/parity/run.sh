#!/usr/bin/env bash
# Make the fixtures of tests/evaluation/test_parity.py by the packages image-reward and hpsv2 themselves:
# bash scripts/parity/run.sh [--packages imagereward hpsv2] [--sizes small true]
# They get an environment of their own, .venv-parity (Python 3.11, several GB, made once). All of it
# takes some two minutes on one core, 9 GB of memory and 4 GB of disk.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/../_env.sh"
cd "$ROOT"
OWN=.venv-parity
PINS=scripts/parity/requirements.txt
# hpsv2 imports turtle, and so Tk, which Debian has in a package of its own (python3-tk).
"$PYTHON" -c 'import tkinter' || fail "hpsv2 needs a Python with tkinter"
if ! cmp -s "$PINS" "$OWN/installed.txt"; then
  "$PYTHON" -m venv "$OWN"
  # openai-clip and fairscale are built from source by a setup.py that needs setuptools' old
  # pkg_resources, so they are not built apart but with these two.
  "$OWN/bin/pip" install --disable-pip-version-check setuptools==80.10.2 wheel==0.48.0
  "$OWN/bin/pip" install --disable-pip-version-check --no-build-isolation -r "$PINS"
  # hpsv2 1.2.0 was published without its vocabulary; it is CLIP's.
  SITE=$("$OWN/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$SITE/clip/bpe_simple_vocab_16e6.txt.gz" "$SITE/hpsv2/src/open_clip/"
  cp "$PINS" "$OWN/installed.txt"
fi
exec "$OWN/bin/python" scripts/parity/oracle.py "$@"

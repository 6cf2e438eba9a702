# Sourced by the other scripts: sets PYTHON and installs what is missing. They run where they were
# called, so that paths mean what they mean to the caller; AT leads from there to the repository
# (nothing, or its root with a slash).
#
# PYTHON is $SDPO_PYTHON, else that of the active virtual or conda environment, else .venv's, which is
# made when there is none. .venv gets the exact versions of constraints.txt; an environment of your
# own keeps the versions it has as long as they are within the ranges of the requirements file.
# The checkout itself is installed too, as it stands (-e), so that `python eval/compare.py` and `sdpo`
# find it when typed by hand. SDPO_SKIP_INSTALL=1 installs nothing.

fail() {
  echo "$(basename "$0"): error: $1" >&2
  exit 2
}

suitable() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if command -v "$name" >/dev/null && suitable "$name"; then
      echo "$name"
      return
    fi
  done
}

use_python() {
  OWN_VENV=
  if [ -n "${SDPO_PYTHON:-}" ]; then
    PYTHON=$SDPO_PYTHON
    command -v "$PYTHON" >/dev/null || fail "SDPO_PYTHON: there is no program $PYTHON"
  elif [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python
  elif [ -n "${CONDA_PREFIX:-}" ]; then
    PYTHON=$CONDA_PREFIX/bin/python
  else
    OWN_VENV=1
    PYTHON=$ROOT/.venv/bin/python
    if ! [ -x "$PYTHON" ]; then
      local base
      base=$(find_python)
      [ -n "$base" ] || fail "no Python 3.10 to 3.13 found; install one or name it: SDPO_PYTHON=..."
      "$base" -m venv "$ROOT/.venv" || fail "could not make .venv with $base"
    fi
  fi
  suitable "$PYTHON" || fail "$PYTHON is not a Python 3.10 to 3.13 (SDPO_PYTHON=... names another)"
}

# install_requirements FILE: once, and again when one of the files read here has changed or the
# checkout has moved.
install_requirements() {
  [ "${SDPO_SKIP_INSTALL:-}" != 1 ] || return 0
  local file=$1 stamp wanted
  local options=(-r "$ROOT/$file")
  [ -z "$OWN_VENV" ] || options+=(-c "$ROOT/constraints.txt")
  stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.sdpo-${file%.txt}
  wanted=$(cd "$ROOT" && { pwd; cat requirements.txt requirements-dev.txt constraints.txt pyproject.toml; } | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "installing $file into $(dirname "$(dirname "$PYTHON")") (once; PyTorch is several GB)"
  "$PYTHON" -m pip install --disable-pip-version-check "${options[@]}" |
    { grep -v '^Requirement already satisfied' || true; } ||
    fail "installing $file failed (see above)"
  # Nothing here depends on it (see PYTHONPATH), so it may fail, as where no network has hatchling.
  options=(--quiet --no-deps --editable "$ROOT")
  ! "$PYTHON" -c 'import hatchling' 2>/dev/null || options+=(--no-build-isolation)
  "$PYTHON" -m pip install --disable-pip-version-check "${options[@]}" 2>/dev/null ||
    echo "pip install -e . failed; the scripts do without it, the command sdpo is not there" >&2
  echo "$wanted" >"$stamp" 2>/dev/null || true
}

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P) || exit
AT=$ROOT/
[ "$(pwd -P)" != "$ROOT" ] || AT=
# Programs in any folder find the package, installed or not.
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
use_python

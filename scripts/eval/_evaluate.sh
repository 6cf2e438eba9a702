# Sourced by test.sh, test_sd15.sh and test_sdxl.sh: what they share.

source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"

# evaluate FLAGS...
evaluate() {
  # The mistakes of flags and paths are answered here, once, and not by every process.
  "$PYTHON" "${AT}eval/evaluate.py" --check_only "$@" || exit
  install_requirements requirements.txt
  launch "${AT}eval/evaluate.py" "$@"
}

# need_unet ARGUMENTS: the first one must be the UNet.
need_unet() {
  case "${1:-}" in
    "" | -*) fail "give the UNet first: bash scripts/eval/$(basename "$0") unet.pth [flags]; \
or \`base\` for the unaligned model" ;;
  esac
}

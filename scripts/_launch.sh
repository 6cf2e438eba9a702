# Sourced after _env.sh: starting a program once per device.

# launch PROGRAM ARGUMENTS...: on all CUDA devices, else in one process on what there is; see
# sdpo/launch.py.
launch() {
  exec "$PYTHON" "${AT}sdpo/launch.py" "$@"
}

# take_config ARGUMENTS...: sets ARGUMENTS to all but --config NAME|FILE, which it gives to launch.
# NAME is one of scripts/configs/.
take_config() {
  local config=
  ARGUMENTS=()
  while [ $# -gt 0 ]; do
    case $1 in
      --config)
        [ $# -gt 1 ] || fail "--config needs a name of scripts/configs/ or a file"
        config=$2
        shift
        ;;
      --config=*) config=${1#--config=} ;;
      *) ARGUMENTS+=("$1") ;;
    esac
    shift
  done
  [ -n "$config" ] || return 0
  [ -f "$config" ] || config=${AT}scripts/configs/$config.yaml
  [ -f "$config" ] || fail "--config: there is no $config; there are $(cd "$ROOT/scripts/configs" && echo *)"
  export SDPO_LAUNCH_ARGS="--config_file '$config' ${SDPO_LAUNCH_ARGS:-}"
}

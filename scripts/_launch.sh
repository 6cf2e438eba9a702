# Sourced after _env.sh: starting a program once per device.

# launch PROGRAM ARGUMENTS...: on all CUDA devices, else in one process on what there is.
# SDPO_LAUNCH_ARGS come last and win, e.g. for several machines:
# "--num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1"
launch() {
  local processes kind=
  processes=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
  if [ "$processes" = 1 ] && [ -z "${SDPO_LAUNCH_ARGS:-}" ]; then
    exec "$PYTHON" "$@"
  fi
  # Said outright: left to guess, accelerate starts a single process where a machine has one GPU of
  # several machines, or where its own default configuration was made for another use.
  case " ${SDPO_LAUNCH_ARGS:-} " in
    *" --multi_gpu "* | *" --cpu "* | *" --tpu "* | *" --use_"* | *" --config_file"*) ;;
    *" --num_machines "*) kind=--multi_gpu ;;
    *) [ "$processes" = 1 ] || kind=--multi_gpu ;;
  esac
  # A configuration says it all; what is given on the command line would win over it.
  case " ${SDPO_LAUNCH_ARGS:-} " in
    *" --config_file"*) ;;
    *) kind="$kind --num_processes $processes --num_machines 1" ;;
  esac
  # shellcheck disable=SC2086
  exec "$PYTHON" -m accelerate.commands.launch $kind --mixed_precision no --dynamo_backend no \
    ${SDPO_LAUNCH_ARGS:-} "$@"
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
  SDPO_LAUNCH_ARGS="--config_file $config ${SDPO_LAUNCH_ARGS:-}"
}

# Sourced by the recipes: train.py with the recipe's values, scripts/recipes/NAME.yaml.
# Arguments given to a recipe come last and so win over its own.

source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"

# train ARGUMENTS...
train() {
  local recipe arguments
  recipe=$(basename "$(readlink -f "$0")" .sh)
  take_config "$@"
  arguments=(--config_file "${AT}scripts/recipes/$recipe.yaml" --output_dir "output/$recipe")
  arguments+=(${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
  # Reading the recipe takes PyYAML; all else is installed when flags and paths are known to be right.
  "$PYTHON" -c 'import yaml' 2>/dev/null || install_requirements requirements.txt
  # Their mistakes are answered here, once, and not by every process.
  "$PYTHON" "${AT}train.py" --check_only "${arguments[@]}" || exit
  case " ${arguments[*]} " in *" --check_only "*) return ;; esac
  install_requirements requirements.txt
  launch "${AT}train.py" "${arguments[@]}"
}

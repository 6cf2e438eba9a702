# Sourced by the recipes: what the official ones share, and how train.py is started.
# Arguments given to a recipe come last and so win over its own.

source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../_launch.sh"

RECIPE=$(basename "$0" .sh)

# The mistakes of flags and paths are answered here, once, and not by every process.
start_training() {
  take_config "$@"
  "$PYTHON" -m sdpo.args "${ARGUMENTS[@]}" || exit
  install_requirements requirements.txt
  launch train.py "${ARGUMENTS[@]}"
}

common_flags() {
  echo --dataset_name yuvalkirstain/pickapic_v2 --split train --proportion_empty_prompts 0.2 \
    --train_batch_size 8 --gradient_accumulation_steps 32 --dataloader_num_workers 4 \
    --max_train_steps 2000 --lr_scheduler constant_with_warmup --lr_warmup_steps 500 --scale_lr \
    --adam_weight_decay 1e-2 --max_grad_norm 1.0 --mixed_precision bf16 --allow_tf32 \
    --checkpointing_steps 500 --output_dir "output/$RECIPE" \
    --use_winner_preserving --winner_preserving_scope batch
}

# train_sd15 FLAGS...: SD1.5 at 512 px with AdamW.
train_sd15() {
  # shellcheck disable=SC2046
  start_training $(common_flags) \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --resolution 512 --learning_rate 1e-8 "$@"
}

# train_sdxl FLAGS...: SDXL at 1024 px with Adafactor and gradient checkpointing.
train_sdxl() {
  # shellcheck disable=SC2046
  start_training $(common_flags) \
    --sdxl --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
    --resolution 1024 --learning_rate 1e-9 --use_adafactor --gradient_checkpointing "$@"
}

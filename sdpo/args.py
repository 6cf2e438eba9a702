"""train.py's flags, and every check on them that needs no model, no data and no torch.

`python -m sdpo.args ...` runs these checks alone (the launch scripts do, so that a mistake is
answered once and at once rather than by every process).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from sdpo.common.cli import Parser, Replace
from sdpo.common.errors import UserError, run_main
from sdpo.config.families import FAMILIES
from sdpo.data.flags import add_source_flags, check_source_flags
from sdpo.data.latents.flags import add_cache_flags, check_cache_flags
from sdpo.losses.preference import FORMS, method_names
from sdpo.models.locations import check_data_location, check_model_location, check_output_dir
from sdpo.safeguard_flags import add_safeguard_flags, check_safeguard_flags
from sdpo.speed_flags import add_speed_flags, check_speed_flags
from sdpo.weight_flags import add_weight_flags, check_weight_flags

MIXED_PRECISION = ("no", "fp16", "bf16")
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
TRACKERS = ("tensorboard", "wandb", "comet_ml", "mlflow", "all", "none")


# A switch that a recipe sets can be taken back with --no-NAME.
_SWITCH = argparse.BooleanOptionalAction


def build_parser(
    program: str = "train.py",
    about: str | None = "Align a text-to-image UNet with preference pairs, with or without the "
    "winner-preserving safeguard.",
) -> argparse.ArgumentParser:
    """The parser of train.py, in groups; flag names are those of the public Diffusion-DPO code."""
    parser = Parser(program, about)
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_method(parser.add_argument_group("method"))
    add_weight_flags(parser.add_argument_group("weights"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_run(parser.add_argument_group("run, checkpoints and logs"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        metavar="ID_OR_DIR",
        help="base pipeline: a hub id or a local directory in diffusers layout",
    )
    add(
        "--pretrained_vae_model_name_or_path",
        metavar="ID_OR_DIR",
        help="VAE instead of the base's own, e.g. madebyollin/sdxl-vae-fp16-fix",
    )
    add("--revision", help="git revision of the base on the hub")
    add(
        "--unet_init",
        metavar="PATH",
        help="start UNet and reference from these weights instead of the base's: unet.pth, "
        ".safetensors, or a diffusers UNet or pipeline (directory or hub id)",
    )
    add("--sdxl", action="store_true", help="the base is an SDXL model (default: SD1.5)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    add_source_flags(group)
    add = group.add_argument
    add(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="stop once more than this share of pairs cannot be decoded (default: 0.01)",
    )
    add("--resolution", type=int, metavar="PX", help="default: 512, with --sdxl 1024")
    add("--random_crop", action="store_true", help="crop at random instead of at the centre")
    add("--no_hflip", action="store_true", help="no random horizontal flip")
    add(
        "--proportion_empty_prompts",
        type=float,
        default=0.2,
        metavar="P",
        help='probability that a caption is replaced by "" (default: 0.2)',
    )
    add("--dataloader_num_workers", type=int, default=0, metavar="N", help="default: 0")
    add_cache_flags(group)


def _add_method(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--train_method",
        choices=method_names(),
        default="diffusion-dpo",
        help="default: diffusion-dpo",
    )
    add("--beta_dpo", type=float, default=5000.0, metavar="BETA", help="default: 5000")
    add("--dmpo_alpha", type=float, default=0.01, metavar="ALPHA", help="DMPO only, default: 0.01")
    add(
        "--dspo_form",
        choices=FORMS,
        help="DSPO only: which of its two losses (default: the base model's family's)",
    )
    add_safeguard_flags(group)
    add(
        "--noise_offset", type=float, default=0.0, help="scale of a per-channel offset of the noise"
    )
    add(
        "--input_perturbation",
        type=float,
        default=0.0,
        help="scale of extra noise at the UNet's input that the target does not contain",
    )


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--train_batch_size", type=int, default=1, metavar="PAIRS", help="per process, default: 1")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="default: 1")
    add(
        "--num_train_epochs",
        action=Replace,
        type=int,
        metavar="N",
        help="passes over the data, instead of --max_train_steps",
    )
    add(
        "--max_train_steps",
        action=Replace,
        type=int,
        metavar="N",
        help="optimizer steps (default: 2000)",
    )
    add("--learning_rate", type=float, default=1e-8, metavar="LR", help="default: 1e-8")
    add(
        "--scale_lr",
        action=_SWITCH,
        default=False,
        help="multiply the rate by processes x batch x accumulation (a rate per pair)",
    )
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup")
    add("--lr_warmup_steps", type=int, default=500, metavar="N", help="default: 500")
    add(
        "--use_adafactor",
        action=_SWITCH,
        default=False,
        help="Adafactor instead of AdamW (less memory)",
    )
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2, help="Adafactor's weight decay too")
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add(
        "--gradient_checkpointing",
        action=_SWITCH,
        default=False,
        help="less memory, slower backward pass",
    )
    add_speed_flags(group)
    add("--mixed_precision", choices=MIXED_PRECISION, default="no", help="default: no")
    add(
        "--allow_tf32",
        action=_SWITCH,
        default=False,
        help="TF32 matrix products on NVIDIA GPUs",
    )
    add(
        "--max_nonfinite_steps",
        type=int,
        default=10,
        metavar="N",
        help="stop after more than N steps in a row with a non-finite loss or gradient",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", default="output/train", metavar="DIR", help="default: output/train")
    add("--seed", type=int, default=0, help="default: 0")
    add("--checkpointing_steps", type=int, default=500, metavar="N", help="default: 500")
    add("--checkpoints_total_limit", type=int, metavar="N", help="keep only the newest N")
    add(
        "--resume_from_checkpoint",
        default="latest",
        metavar="latest|none|DIR",
        help="latest (default): go on from the newest complete checkpoint of --output_dir if "
        "there is one; none: refuse to; or a checkpoint directory",
    )
    add(
        "--validation_prompts",
        nargs="+",
        default=[],
        metavar="PROMPT",
        help="prompts of the sample grid, or one .txt file with a prompt a line",
    )
    add(
        "--validation_steps",
        type=int,
        default=500,
        metavar="N",
        help="draw the grid every N steps (default: 500)",
    )
    add("--report_to", default="tensorboard", choices=TRACKERS, help="default: tensorboard")
    add("--logging_dir", default="logs", help="under --output_dir, default: logs")
    add("--tracker_project_name", default="sdpo")


def parse_args(
    argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parse and check train.py's flags; resolutions and step counts are filled in. `parser` is
    train.py's own or one with flags more.

    Raises:
        UserError: naming the flag and what would be right.
    """
    args = (parser or build_parser()).parse_args(argv)
    _expand_home(args)
    _check_numbers(args)
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 2000
    if args.resolution is None:
        args.resolution = FAMILIES["sdxl" if args.sdxl else "sd15"].resolution
    if args.dspo_form and args.train_method != "dspo":
        raise UserError(f"--dspo_form has no meaning with --train_method {args.train_method}")
    check_safeguard_flags(args)
    check_source_flags(args)
    check_cache_flags(args)
    check_speed_flags(args)
    check_weight_flags(args)
    _read_validation_prompts(args)
    check_model_location(args)
    check_data_location(args)
    check_output_dir(args)
    return args


def _expand_home(args: argparse.Namespace) -> None:
    # Shells leave the ~ of --flag=~/dir as it is.
    for name in _PATHS:
        value = getattr(args, name)
        if value and value.startswith("~"):
            # An unknown user's stays as it is, and is answered as a path that is not there.
            setattr(args, name, os.path.expanduser(value))


def _check_numbers(args: argparse.Namespace) -> None:
    for name in _POSITIVE_INTS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    for name in _NOT_NEGATIVE:
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name} must be a number of at least 0, got {value}")
    for name in _POSITIVE:
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} must be a number above 0, got {value}")
    for name in _SHARES:
        value = getattr(args, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"--{name} must lie between 0 and 1, got {value}")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(args, name)
        if not 0.0 <= value < 1.0:
            raise UserError(f"--{name} must be at least 0 and below 1, got {value}")
    if args.resolution is not None and args.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8, got {args.resolution}")
    if args.streaming and args.num_train_epochs is not None:
        raise UserError("--streaming does not know an epoch's length: give --max_train_steps")
    if args.streaming and args.dataloader_num_workers > 1:
        raise UserError("--streaming reads one stream: --dataloader_num_workers must be 0 or 1")


_PATHS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "unet_init",
    "dataset_name",
    "train_data_dir",
    "cache_dir",
    "cache_dir_latents",
    "output_dir",
    "resume_from_checkpoint",
)
_POSITIVE_INTS = (
    "resolution",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "max_nonfinite_steps",
)
_NOT_NEGATIVE = (
    "seed",
    "lr_warmup_steps",
    "dataloader_num_workers",
    "noise_offset",
    "input_perturbation",
    "adam_weight_decay",
)
_POSITIVE = ("beta_dpo", "learning_rate", "adam_epsilon", "max_grad_norm")
_SHARES = ("winner_preserving_mu", "dmpo_alpha", "proportion_empty_prompts", "max_bad_fraction")


def _read_validation_prompts(args: argparse.Namespace) -> None:
    if len(args.validation_prompts) != 1 or not args.validation_prompts[0].endswith(".txt"):
        return
    path = Path(args.validation_prompts[0])
    if not path.is_file():
        raise UserError(f"--validation_prompts: there is no file {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    args.validation_prompts = [line for line in lines if line.strip()]
    if not args.validation_prompts:
        raise UserError(f"--validation_prompts: {path} holds no prompt")


if __name__ == "__main__":
    run_main(lambda: parse_args(sys.argv[1:]) and None, "train.py")

"""Checks of paths named by train.py's flags: cheap, before torch is imported."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.config.families import FAMILIES, family_of_config

WEIGHT_SUFFIXES = frozenset({".pth", ".pt", ".bin", ".safetensors"})
# ORG/NAME; a path that begins with a dot is none.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def looks_local(name: str) -> bool:
    """Whether a "hub id or directory" value can only mean a path on this machine."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()


def check_model_location(args: argparse.Namespace) -> None:
    """A local base must be a diffusers directory of the family that --sdxl (or its absence) names.

    Raises:
        UserError: otherwise. Hub ids are checked when their config arrives.
    """
    check_component_dir(
        args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", "unet/config.json"
    )
    base = Path(args.pretrained_model_name_or_path)
    if base.is_dir():
        check_family(read_config(base / "unet/config.json"), args.sdxl, str(base))
    if args.pretrained_vae_model_name_or_path:
        check_component_dir(
            args.pretrained_vae_model_name_or_path,
            "--pretrained_vae_model_name_or_path",
            "config.json",
        )
    if args.unet_init:
        init = Path(args.unet_init)
        is_file_name = init.suffix in WEIGHT_SUFFIXES
        if (is_file_name or looks_local(args.unet_init)) and not init.exists():
            raise UserError(f"--unet_init: there is no file or directory {args.unet_init}")


def check_component_dir(name: str, flag: str, needed: str) -> None:
    """A "hub id or directory" value that is a path must be a directory that holds `needed`.

    Raises:
        UserError: naming the flag.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / needed).is_file():
            raise UserError(f"{flag}: {name} has no {needed}, so it is not in diffusers layout")
    elif path.is_file():
        raise UserError(f"{flag}: {name} is a file; give a directory in diffusers layout")
    elif looks_local(name):
        raise UserError(f"{flag}: there is no directory {name}")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as a dict.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def check_family(unet_config: dict[str, Any], sdxl: bool, where: str) -> None:
    """Refuse a UNet config that is not of the family asked for.

    Raises:
        UserError: naming --sdxl.
    """
    wanted = "sdxl" if sdxl else "sd15"
    found = family_of_config(unet_config)
    if found != wanted:
        raise UserError(f"{where} holds an {FAMILIES[found].label} UNet: {FAMILIES[found].advice}")


def check_data_location(args: argparse.Namespace) -> None:
    """A local data directory must exist and hold something that can be pairs.

    Raises:
        UserError: naming the flag.
    """
    flag = "--train_data_dir" if args.train_data_dir else "--dataset_name"
    name = args.train_data_dir or args.dataset_name
    path = Path(name)
    if path.is_dir():
        from sdpo.data.local import find_local_files

        find_local_files(path, args.split, flag)
    elif path.is_file():
        raise UserError(f"{flag}: {name} is a file; give the directory it lies in")
    elif args.train_data_dir or looks_local(name):
        raise UserError(f"{flag}: there is no directory {name}")


def check_output_dir(args: argparse.Namespace) -> None:
    """--output_dir must be usable and --resume_from_checkpoint must name something there.

    Raises:
        UserError: otherwise.
    """
    from sdpo.training.checkpoint_paths import (
        is_complete,
        latest_checkpoint,
        list_checkpoints,
        step_of,
    )

    output = Path(args.output_dir)
    check_directory(output, "--output_dir")
    wanted = args.resume_from_checkpoint
    if wanted == "none":
        if list_checkpoints(output):
            raise UserError(
                f"--resume_from_checkpoint none: {output} already holds checkpoints; give another "
                "--output_dir, or `latest` to go on from them"
            )
    elif wanted != "latest":
        named, newest = Path(wanted), latest_checkpoint(output)
        if not is_complete(named):
            raise UserError(
                f"--resume_from_checkpoint: {wanted} is not a complete checkpoint directory; give "
                "one like output/train/checkpoint-500, `latest` or `none`"
            )
        # They would be neither overwritten nor told apart from those of the new course.
        if newest is not None and step_of(newest) > step_of(named):
            raise UserError(
                f"--resume_from_checkpoint: {output} already holds {newest.name}, which is later "
                f"than {wanted}; give another --output_dir, or `latest` to go on from the newest"
            )

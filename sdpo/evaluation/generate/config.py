"""generate.py's flags, and every check on them that needs no torch and no network."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sdpo.common.cli import at_least
from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.config.families import FAMILIES
from sdpo.evaluation.generate.suites import KNOWN_SUITES
from sdpo.evaluation.generate.unets import BASE, check_unet, label_of
from sdpo.models.locations import check_component_dir, check_family, read_config

PROTOCOL_NAMES = ("paper", "diffusers")
DTYPE_NAMES = ("bf16", "fp16", "fp32")
PUBLISHED_SUITES = ("papv2", "hpsv2", "partiprompts")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of generate.py, which evaluate.py has too."""
    add = parser.add_argument_group("generation").add_argument
    add(
        "--unet",
        required=True,
        metavar="UNET",
        help="unet.pth, .safetensors, a diffusers UNet or pipeline directory, a checkpoint or run "
        "directory of train.py, ORG/REPO:path/unet.pth on the hub, or `base`",
    )
    add(
        "--suites",
        nargs="+",
        default=list(PUBLISHED_SUITES),
        metavar="SUITE",
        help=f"prompts: {', '.join(KNOWN_SUITES)}, or a JSON, JSONL, CSV, TSV or TXT file "
        f"(default: {' '.join(PUBLISHED_SUITES)})",
    )
    add("--sdxl", action="store_true", help="the model is an SDXL model (default: SD1.5)")
    add(
        "--pretrained_model_name_or_path",
        metavar="ID_OR_DIR",
        help="base pipeline, for all but the UNet (default: the family's official one)",
    )
    add(
        "--pretrained_vae_model_name_or_path",
        metavar="ID_OR_DIR",
        help="VAE (default: SD1.5's own; for SDXL madebyollin/sdxl-vae-fp16-fix; `base`: the "
        "base's own)",
    )
    add("--revision", help="git revision of the base on the hub")
    add("--cache_dir", metavar="DIR", help="where downloads are kept")
    add("--prompt_source", metavar="DIR", help="files to build missing suites from, off line")
    add("--outdir", type=Path, metavar="DIR", help="default: output/eval/<name of the UNet>")
    add(
        "--protocol",
        choices=PROTOCOL_NAMES,
        default="paper",
        help="paper (default): as published, one noise for all prompts; diffusers: a plain "
        "pipeline with a seed for every prompt",
    )
    add("--steps", type=int, default=50, help="default: 50")
    add(
        "--cfg",
        type=float,
        help="guidance c (default: 7.5; with --protocol diffusers and --sdxl 5.0). paper: cond + c "
        "(cond - uncond); diffusers: uncond + c (cond - uncond)",
    )
    add("--seed", type=int, default=0, help="default: 0")
    add("--resolution", type=int, metavar="PX", help="default: 512, with --sdxl 1024")
    add("--batch_size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    add("--dtype", choices=DTYPE_NAMES, default="bf16", help="of UNet and text encoders")
    add("--limit", type=int, metavar="N", help="only the first N prompts of each suite")


def check_generation_flags(args: argparse.Namespace) -> None:
    """Check, and fill in what depends on other flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    at_least(args, 1, "steps", "batch_size", "resolution", "limit")
    if args.resolution is not None and args.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8, got {args.resolution}")
    at_least(args, 0, "seed")
    if args.cfg is None:
        args.cfg = 5.0 if args.protocol == "diffusers" and args.sdxl else 7.5
    if not math.isfinite(args.cfg):
        raise UserError(f"--cfg must be a number, got {args.cfg}")
    family = FAMILIES["sdxl" if args.sdxl else "sd15"]
    args.resolution = args.resolution or family.resolution
    if args.pretrained_vae_model_name_or_path == "base":
        args.pretrained_vae_model_name_or_path = None
    elif args.pretrained_vae_model_name_or_path is None:
        args.pretrained_vae_model_name_or_path = family.vae
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or family.base
    check_unet(args.unet, args.sdxl)
    _check_models(args)
    if args.outdir is None:
        # The base of either family is called `base`.
        label = f"{args.unet}_{'sdxl' if args.sdxl else 'sd15'}" if args.unet == BASE else None
        args.outdir = Path("output/eval") / (label or label_of(args.unet))
    check_directory(args.outdir, "--outdir")


def _check_models(args: argparse.Namespace) -> None:
    flag, base = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
    check_component_dir(base, flag, "unet/config.json")
    config = Path(base) / "unet/config.json"
    if config.is_file():
        check_family(read_config(config), args.sdxl, base)
    vae = args.pretrained_vae_model_name_or_path
    if vae:
        check_component_dir(vae, "--pretrained_vae_model_name_or_path", "config.json")

"""The flags of the latent and text cache, and the checks on them that need no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdpo.common.errors import UserError

CACHE_FLAG = "--cache_dir_latents"
CACHE_DTYPES = ("bf16", "fp16", "fp32")


def add_cache_flags(group: argparse._ArgumentGroup) -> None:
    """Where encoded pairs are kept and how."""
    add = group.add_argument
    add(
        CACHE_FLAG,
        metavar="DIR",
        help="train from encoded images and captions kept in DIR, without VAE and text encoders in "
        "memory; what is missing there is encoded first (or ahead: scripts/data/cache_latents.sh)",
    )
    add(
        "--cache_dtype",
        choices=CACHE_DTYPES,
        default="bf16",
        help="of the kept numbers, default: bf16 (rounds by at most 2^-8 of each)",
    )
    add(
        "--cache_batch_size",
        type=int,
        default=8,
        metavar="PAIRS",
        help="pairs encoded at a time while the cache is built, default: 8",
    )
    add(
        "--verify_cache",
        action="store_true",
        help="compare every file of the cache with its checksum before training (their sizes are "
        "always compared)",
    )


def check_cache_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot be kept.

    Raises:
        UserError: naming the flag and what would be right.
    """
    if args.cache_batch_size < 1:
        raise UserError(f"--cache_batch_size must be at least 1, got {args.cache_batch_size}")
    if args.cache_dir_latents is None:
        if args.verify_cache:
            raise UserError(f"--verify_cache has no meaning without {CACHE_FLAG}")
        return
    if args.streaming:
        raise UserError(
            f"{CACHE_FLAG} keeps rows by their numbers, which a stream does not have: leave "
            "--streaming out"
        )
    if args.random_crop:
        raise UserError(
            f"{CACHE_FLAG} keeps one crop of each image, the centre: leave --random_crop out"
        )
    path = Path(args.cache_dir_latents)
    if path.exists() and not path.is_dir():
        raise UserError(f"{CACHE_FLAG}: {path} is a file; give a directory")

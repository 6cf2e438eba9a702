"""train.py's flags that say how much of the loser's gradient is kept."""

from __future__ import annotations

import argparse

from sdpo.common.errors import UserError


def add_safeguard_flags(group: argparse._ArgumentGroup) -> None:
    """The safeguard, and a constant in its place."""
    add = group.add_argument
    add(
        "--use_winner_preserving",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="scale the loser's gradient so that a step does not raise the winner's loss",
    )
    add(
        "--winner_preserving_mu",
        type=float,
        default=0.9,
        metavar="MU",
        help="share of the winner's own decrease that must remain, 0 to 1 (default: 0.9)",
    )
    add(
        "--winner_preserving_scope",
        choices=("batch", "pair"),
        default="batch",
        help="one scale per micro-batch (as published, the default) or per pair",
    )
    add(
        "--winner_preserving_space",
        choices=("output", "parameter"),
        default="output",
        help="take the scale from gradients at the UNet's output (as published, the default) or "
        "over the trained parameters, which costs one more forward and backward pass; scope batch "
        "is then one scale for the whole step",
    )
    add(
        "--loser_scale_fixed",
        type=float,
        metavar="C",
        help="multiply the loser's gradient by a constant, 0 to 1, in place of the safeguard",
    )


def check_safeguard_flags(args: argparse.Namespace) -> None:
    """Checks that need no model.

    Raises:
        UserError: naming the flag and what would be right.
    """
    fixed = args.loser_scale_fixed
    if fixed is not None and not 0.0 <= fixed <= 1.0:
        raise UserError(f"--loser_scale_fixed must lie between 0 and 1, got {fixed}")
    if fixed is not None and args.use_winner_preserving:
        raise UserError(
            "--loser_scale_fixed takes the place of the safeguard's scale: leave "
            "--use_winner_preserving out (--no-use_winner_preserving takes back a recipe's)"
        )
    if args.winner_preserving_space == "parameter" and not args.use_winner_preserving:
        raise UserError(
            "--winner_preserving_space parameter has no meaning without --use_winner_preserving"
        )
    if args.train_method != "sft":
        return
    for given, name in (
        (args.use_winner_preserving, "use_winner_preserving"),
        (fixed is not None, "loser_scale_fixed"),
    ):
        if given:
            raise UserError(f"--{name} has no meaning with --train_method sft: no losers")

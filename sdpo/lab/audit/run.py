"""Does an update raise the winners' loss, and do the method's assumptions hold at a checkpoint?

    python -m sdpo.lab audit --checkpoint output/run/checkpoint-500 --steps 32 TRAIN_FLAGS...

takes train.py's flags, which say on what data, by which method and at which step size the
checkpoint would be trained on. Nothing is trained. On each of --steps batches of --train_batch_size
pairs it finds what the next update would be, for every way of treating the losers, the first-order
change of the winners' errors along it, and their real change after it: on that batch, and on the
one after it. Then it compares, pair by pair, the gradients over the parameters with the residuals
that the safeguard puts in their place, and estimates the spectrum of the Jacobians. All in float32,
whatever --mixed_precision says.
Written to --output_dir: updates.jsonl, jacobian.jsonl, spectrum.jsonl, summary.json and PNGs;
killed at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sdpo import args as train_args
from sdpo.common.cli import at_least
from sdpo.common.errors import UserError
from sdpo.common.files import claim_directory, write_json
from sdpo.models.locations import WEIGHT_SUFFIXES

PROGRAM = "python -m sdpo.lab audit"
SUMMARY_FILE = "summary.json"
# What the audit does not reproduce; each would need a way of its own.
NOT_SERVED = (
    "lora_rank",
    "use_adafactor",
    "use_8bit_adam",
    "cache_dir_latents",
    "choice_model",
    "loser_scale_fixed",
)


def build_parser() -> argparse.ArgumentParser:
    """Train.py's flags and the audit's own."""
    parser = train_args.build_parser(PROGRAM, __doc__)
    parser.set_defaults(output_dir="output/audit", report_to="none")
    add = parser.add_argument_group("audit").add_argument
    add(
        "--checkpoint",
        metavar="PATH",
        help="the weights to audit: a run's checkpoint-N/, which brings AdamW's moments and its "
        "place in the data along, or unet.pth / .safetensors (default: the base's own)",
    )
    add("--steps", type=int, default=32, metavar="N", help="batches to look at (default: 32)")
    add(
        "--fixed_scales",
        type=float,
        nargs="*",
        default=[0.0, 0.25, 0.5, 0.75],
        metavar="C",
        help="fixed scales to compare with (default: 0 0.25 0.5 0.75)",
    )
    add(
        "--moment_batches",
        type=int,
        default=8,
        metavar="N",
        help="where the checkpoint holds no moments: batches to make them from, as if N steps had "
        "been taken without moving (default: 8)",
    )
    add(
        "--jacobian_pairs",
        type=int,
        default=64,
        metavar="N",
        help="pairs whose gradients over the parameters are compared with their residuals "
        "(default: 64)",
    )
    add(
        "--spectrum_pairs",
        type=int,
        default=4,
        metavar="N",
        help="pairs whose Jacobians' spectrum is estimated (default: 4; 0: none)",
    )
    add("--probes", type=int, default=4, metavar="N", help="random vectors each (default: 4)")
    add("--lanczos", type=int, default=24, metavar="N", help="Lanczos iterations (default: 24)")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The program's flags, checked.

    Raises:
        UserError: naming the flag and what would be right.
    """
    args = train_args.parse_args(argv, build_parser())
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    for name in NOT_SERVED:
        # 0.0 is a value that a flag can have been given.
        if getattr(args, name, None) not in (None, False):
            raise UserError(f"--{name}: the audit does not serve it; leave it out")
    if args.winner_preserving_space == "parameter" and args.winner_preserving_scope == "pair":
        raise UserError("--winner_preserving_scope pair: the audit serves it at the output alone")
    if args.train_method == "sft":
        raise UserError("--train_method sft has no losers to audit")
    at_least(args, 1, "steps", "moment_batches", "jacobian_pairs", "probes", "lanczos")
    at_least(args, 0, "spectrum_pairs")
    for c in args.fixed_scales:
        if not (math.isfinite(c) and 0.0 <= c <= 1.0):
            raise UserError(f"--fixed_scales must lie between 0 and 1, got {c}")
    if args.checkpoint is None:
        return
    path = Path(args.checkpoint)
    if path.is_dir():
        from sdpo.training.checkpoint_paths import is_complete

        if not is_complete(path):
            raise UserError(f"--checkpoint: {path} is not a complete checkpoint-N directory")
    elif not path.is_file() or path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"--checkpoint: {path} is neither a checkpoint-N directory nor a file of weights "
            f"({', '.join(sorted(WEIGHT_SUFFIXES))})"
        )


def main(argv: list[str]) -> int:
    """Measure what is not measured yet, sum up, draw, print."""
    args = parse_args(argv)
    out = Path(args.output_dir)
    flags = {k: v for k, v in vars(args).items() if k != "output_dir"}
    claim_directory(out, flags, "--output_dir", "an audit")

    from sdpo.lab.audit.figures import draw
    from sdpo.lab.audit.measure import measure
    from sdpo.lab.audit.summary import print_summary, summarise

    lines = measure(args, out)
    summary = summarise(lines, flags)
    write_json(out / SUMMARY_FILE, summary)
    draw(lines, summary, out)
    print_summary(summary)
    return 0

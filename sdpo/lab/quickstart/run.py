"""The safeguard's effect on a laptop: the same preference training twice, without and with it.

    python -m sdpo.lab.quickstart.run

Writes preference pairs, runs train.py twice from the shipped tiny model (same seed, same data),
measures every checkpoint on held-out pairs, generates images from the base and both results, scores
and compares them, and draws it all. All of it goes through the programs that real runs use. Killed
at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from sdpo.common.cli import Parser, at_least
from sdpo.common.errors import UserError, run_main
from sdpo.common.files import ROOT, check_directory, claim_directory, program, write_json
from sdpo.common.programs import run_step
from sdpo.evaluation.heldout import read_heldout

BASE = ROOT / "assets" / "tiny-sd15"
RESOLUTION = 64
# Found by trying: twice as large a step leaves the first order that the rule speaks of.
LEARNING_RATE = 5e-5
WARMUP_STEPS = 20
SUITE_SIZE = 128
SAMPLE_STEPS = 25
SAMPLE_BATCH = 64
GUIDANCE = 5.0


@dataclass(frozen=True)
class TinyRecipe:
    """A method's strengths."""

    beta: float
    mu: float
    alpha: float = 0.0


# beta, mu and alpha are those of the official SD1.5 recipes.
RECIPES = {
    "diffusion-dpo": TinyRecipe(beta=5000, mu=0.9),
    "dspo": TinyRecipe(beta=0.001, mu=0.2),
    "dmpo": TinyRecipe(beta=2000, mu=0.9, alpha=0.01),
}
SUMMARY_FILE = "summary.json"
VARIANTS = ("plain", "safeguard")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The program's flags.

    Raises:
        UserError: on a value out of range.
    """
    parser = Parser("quickstart", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("output/quickstart"), help="default: output/quickstart")
    add("--method", choices=sorted(RECIPES), default="diffusion-dpo", help="default: diffusion-dpo")
    add("--steps", type=int, default=160, help="optimizer steps of each run (default: 160)")
    add("--batch", type=int, default=32, help="pairs a step (default: 32)")
    add("--pairs", type=int, default=4096, help="training pairs (default: 4096)")
    add("--heldout", type=int, default=256, help="held-out pairs (default: 256)")
    add(
        "--prompts",
        type=int,
        default=128,
        help="prompts to draw, at most 128 (the default)",
    )
    add("--learning_rate", type=float, default=LEARNING_RATE, help=f"default: {LEARNING_RATE:g}")
    add("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    at_least(args, 1, "steps", "batch", "pairs", "heldout", "prompts")
    if args.prompts > SUITE_SIZE:
        raise UserError(f"--prompts: the tiny suite holds {SUITE_SIZE}, got {args.prompts}")
    if args.pairs < 2 * args.batch:
        raise UserError(f"--pairs must be at least twice --batch ({2 * args.batch})")
    if not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning_rate must be a number above 0, got {args.learning_rate}")
    at_least(args, 0, "seed")
    check_directory(args.out, "--out")
    if not (BASE / "model_index.json").is_file():
        raise UserError(
            f"{BASE} is missing: get it with the repository, or make it with "
            "bash scripts/pretrain_tinyworld.sh"
        )
    return args


def main() -> int:
    """Train both variants, evaluate, draw, print the table."""
    args = parse_args(sys.argv[1:])
    flags = {name: value for name, value in vars(args).items() if name != "out"}
    claim_directory(args.out, flags, "--out", "a quickstart")
    pairs = args.out / "pairs"

    from sdpo.tinyworld.pairs import ensure_pairs

    ensure_pairs(pairs, args.pairs, args.heldout, args.seed)
    for variant in VARIANTS:
        train(args, variant, pairs)
        evaluate_heldout(args.out / variant, pairs, args.steps)

    manifests = {model: generate(args, model) for model in ("base", *VARIANTS)}
    score(manifests, args.out / "eval")
    compare(manifests, args.out / "compare")

    from sdpo.lab.quickstart.figures import draw_curves, draw_samples, print_table, rows_of

    rows = rows_of(args.out, manifests)
    draw_curves(args.out, args.out / "curves.png", args.method)
    draw_samples(manifests, args.out / "samples.png")
    write_json(args.out / SUMMARY_FILE, {"command": sys.argv[1:], "rows": rows})
    print_table(rows)
    print(
        f"\nLook at {args.out / 'curves.png'}, {args.out / 'samples.png'} and "
        f"{args.out / 'compare' / 'report.html'}"
    )
    return 0


def train(args: argparse.Namespace, variant: str, pairs: Path) -> None:
    """One train.py run; it resumes by itself and is over at once when it is done."""
    recipe = RECIPES[args.method]
    command = [
        *program("train.py"),
        *("--pretrained_model_name_or_path", str(BASE)),
        *("--train_data_dir", str(pairs)),
        *("--cache_dir", str(args.out / "cache")),
        *("--output_dir", str(args.out / variant)),
        *("--train_method", args.method),
        *("--beta_dpo", str(recipe.beta)),
        *("--dmpo_alpha", str(recipe.alpha)),
        *("--winner_preserving_mu", str(recipe.mu)),
        *("--resolution", str(RESOLUTION)),
        *("--train_batch_size", str(args.batch)),
        *("--max_train_steps", str(args.steps)),
        *("--checkpointing_steps", str(max(1, args.steps // 10))),
        *("--learning_rate", str(args.learning_rate)),
        *("--lr_warmup_steps", str(WARMUP_STEPS)),
        *("--proportion_empty_prompts", "0.1"),
        *("--seed", str(args.seed)),
        "--no_hflip",  # captions say left and right
    ]
    if variant == "safeguard":
        command.append("--use_winner_preserving")
    run_step(command, f"training ({variant})")


def evaluate_heldout(directory: Path, pairs: Path, steps: int) -> None:
    """Errors of every checkpoint on held-out pairs, to heldout.jsonl, unless it is there."""
    if any(entry["step"] == steps for entry in read_heldout(directory)):
        return
    run_step(
        [
            *(sys.executable, "-m", "sdpo.evaluation.heldout", str(directory)),
            *("--train_data_dir", str(pairs)),
            *("--split", "heldout"),
        ],
        f"held-out evaluation ({directory.name})",
    )


def generate(args: argparse.Namespace, model: str) -> Path:
    """The images of one model, by eval/generate.py; returns their manifest."""
    unet = "base" if model == "base" else str(args.out / model / "pipeline")
    outdir = args.out / "eval" / model
    run_step(
        [
            *program("eval/generate.py"),
            *("--unet", unet),
            *("--pretrained_model_name_or_path", str(BASE)),
            *("--suites", "tinyworld"),
            *("--limit", str(args.prompts)),
            *("--outdir", str(outdir)),
            # A noise of its own for every prompt, and float32: a CPU gains nothing by less.
            *("--protocol", "diffusers"),
            *("--dtype", "fp32"),
            *("--resolution", str(RESOLUTION)),
            *("--steps", str(SAMPLE_STEPS)),
            *("--cfg", str(GUIDANCE)),
            *("--batch_size", str(SAMPLE_BATCH)),
        ],
        f"generation ({model})",
    )
    (manifest,) = (p for p in outdir.glob("tinyworld_*.json") if "_scores" not in p.name)
    return manifest


def score(manifests: dict[str, Path], outdir: Path) -> None:
    """The oracle's scores of all models' images, by eval/score.py."""
    run_step(
        [
            *program("eval/score.py"),
            *map(str, manifests.values()),
            *("--scorers", "oracle", "--outdir", str(outdir)),
        ],
        "scoring",
    )


def compare(manifests: dict[str, Path], outdir: Path) -> None:
    """Win rates of every model over every other, and report.html, by eval/compare.py."""
    from sdpo.lab.quickstart.figures import LABELS

    # The last two are what the page shows first.
    named = [f"{LABELS.get(name, name)}={manifests[name]}" for name in reversed(manifests)]
    run_step(
        [
            *program("eval/compare.py"),
            *("--json", *named),
            *("--scorers", "oracle", "--outdir", str(outdir)),
        ],
        "comparison",
    )


if __name__ == "__main__":
    run_main(main, "quickstart")

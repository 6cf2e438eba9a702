"""The safeguard's effect on a laptop: the same preference training twice, without and with it.

    python -m sdpo.lab quickstart

Writes preference pairs, runs train.py twice from the shipped tiny model (same seed, same data),
measures every checkpoint on held-out pairs, generates images from the base and both results, scores
and compares them, and draws it all. All of it goes through the programs that real runs use. Killed
at any point, the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError
from sdpo.common.files import ROOT, check_directory, claim_directory, program, write_json
from sdpo.common.flags import ABOVE_ZERO, at_least, defaults_of, flag, flat, parse
from sdpo.common.programs import run_step
from sdpo.evaluation.heldout import read_heldout

BASES = {"sd15": ROOT / "assets" / "tiny-sd15", "sd3": ROOT / "assets" / "tiny-sd3"}
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


# beta, mu and alpha are those of the official SD1.5 recipes; on velocities beta counts for more.
RECIPES = {
    "diffusion-dpo": TinyRecipe(beta=5000, mu=0.9),
    "dspo": TinyRecipe(beta=0.001, mu=0.2),
    "dmpo": TinyRecipe(beta=2000, mu=0.9, alpha=0.01),
}
FLOW_RECIPES = {**RECIPES, "diffusion-dpo": TinyRecipe(beta=2000, mu=0.9)}
SUMMARY_FILE = "summary.json"
VARIANTS = ("plain", "safeguard")
STAGES = (
    "training without the safeguard",
    "training with the safeguard",
    "images of the base and both results",
    "scores of the images",
    "comparison and pictures",
)


@dataclass(frozen=True)
class QuickstartConfig:
    """The program's flags."""

    out: Path = flag(Path("output/quickstart"), "where everything is written")
    base: str = flag(
        "sd15",
        "tiny model to start from: sd15, a UNet that predicts noise; sd3, a transformer under "
        "rectified flow",
        choices=tuple(BASES),
    )
    method: str = flag("diffusion-dpo", "the loss", choices=sorted(RECIPES))
    steps: int = flag(160, "optimizer steps of each run", check=at_least(1))
    batch: int = flag(32, "pairs a step", check=at_least(1))
    pairs: int = flag(4096, "training pairs", check=at_least(1))
    heldout: int = flag(256, "held-out pairs", check=at_least(1))
    prompts: int = flag(SUITE_SIZE, f"prompts to draw, at most {SUITE_SIZE}", check=at_least(1))
    learning_rate: float = flag(LEARNING_RATE, "optimizer's rate", check=ABOVE_ZERO)
    seed: int = flag(0, "of every random choice", check=at_least(0))


def parse_config(argv: Sequence[str]) -> QuickstartConfig:
    """Parse the program's command line and check it.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(QuickstartConfig, argv, "quickstart", __doc__)
    if config.prompts > SUITE_SIZE:
        raise UserError(f"--prompts: the tiny suite holds {SUITE_SIZE}, got {config.prompts}")
    if config.pairs < 2 * config.batch:
        raise UserError(f"--pairs must be at least twice --batch ({2 * config.batch})")
    check_directory(config.out, "--out")
    base = BASES[config.base]
    if not (base / "model_index.json").is_file():
        raise UserError(
            f"{base} is missing: get it with the repository, or make it with "
            "bash scripts/pretrain_tinyworld.sh"
        )
    return config


def main(argv: Sequence[str]) -> int:
    """Train both variants, evaluate, draw, print the table; returns the exit code.

    Raises:
        UserError: a flag is wrong, or a program failed.
    """
    config = parse_config(argv)
    out, pairs = config.out, config.out / "pairs"
    flags = {name: value for name, value in flat(config).items() if name != "out"}
    claim_directory(out, flags, "--out", "a quickstart", defaults_of(type(config)))

    from sdpo.tinyworld.pairs import ensure_pairs

    print(f"{len(STAGES)} stages: {'; '.join(STAGES)}", flush=True)
    ensure_pairs(pairs, config.pairs, config.heldout, config.seed)
    for number, variant in enumerate(VARIANTS):
        announce(number)
        train(config, variant, pairs)
        evaluate_heldout(out / variant, pairs, config.steps)

    announce(2)
    manifests = {model: generate(config, model) for model in ("base", *VARIANTS)}
    announce(3)
    score(manifests, out / "eval")
    announce(4)
    compare(manifests, out / "compare")

    from sdpo.lab.quickstart.figures import draw_curves, draw_samples, print_table, rows_of

    rows = rows_of(out, manifests)
    draw_curves(out, out / "curves.png", config.method)
    draw_samples(manifests, out / "samples.png")
    write_json(out / SUMMARY_FILE, {"command": list(argv), "rows": rows})
    print_table(rows)
    print(
        f"\nLook at {out / 'curves.png'}, {out / 'samples.png'} and "
        f"{out / 'compare' / 'report.html'}"
    )
    return 0


def announce(number: int) -> None:
    """Say which stage begins, from 0 on."""
    print(f"\n{number + 1}/{len(STAGES)} {STAGES[number]}", flush=True)


def run(command: list[str], what: str, *values: object, **flags: Any) -> None:
    """Run one of the project's programs to its end with arguments and flags."""
    run_step([*command, *map(str, values), *as_argv(flags)], what)


def train(config: QuickstartConfig, variant: str, pairs: Path) -> None:
    """Run train.py once; it resumes by itself and is over at once when it is done."""
    recipe = (FLOW_RECIPES if config.base == "sd3" else RECIPES)[config.method]
    run(
        program("train.py"),
        f"training ({variant})",
        pretrained_model_name_or_path=BASES[config.base],
        train_data_dir=pairs,
        cache_dir=config.out / "cache",
        output_dir=config.out / variant,
        train_method=config.method,
        beta_dpo=recipe.beta,
        dmpo_alpha=recipe.alpha,
        winner_preserving_mu=recipe.mu,
        resolution=RESOLUTION,
        train_batch_size=config.batch,
        max_train_steps=config.steps,
        checkpointing_steps=max(1, config.steps // 10),
        learning_rate=config.learning_rate,
        lr_warmup_steps=WARMUP_STEPS,
        proportion_empty_prompts=0.1,
        seed=config.seed,
        no_hflip=True,  # captions say left and right
        use_winner_preserving=variant == "safeguard",
    )


def evaluate_heldout(directory: Path, pairs: Path, steps: int) -> None:
    """Measure every checkpoint on held-out pairs, to heldout.jsonl, unless it is there."""
    if any(entry["step"] == steps for entry in read_heldout(directory)):
        return
    command = [sys.executable, "-m", "sdpo.evaluation.heldout"]
    what = f"held-out evaluation ({directory.name})"
    run(command, what, directory, train_data_dir=pairs, split="heldout")


def generate(config: QuickstartConfig, model: str) -> Path:
    """Make the images of one model by eval/generate.py; returns their manifest."""
    outdir = config.out / "eval" / model
    run(
        program("eval/generate.py"),
        f"generation ({model})",
        unet="base" if model == "base" else config.out / model / "pipeline",
        pretrained_model_name_or_path=BASES[config.base],
        suites="tinyworld",
        limit=config.prompts,
        outdir=outdir,
        # A noise of its own for every prompt, and float32: a CPU gains nothing by less.
        protocol="diffusers",
        dtype="fp32",
        resolution=RESOLUTION,
        steps=SAMPLE_STEPS,
        cfg=GUIDANCE,
        batch_size=SAMPLE_BATCH,
    )
    (manifest,) = (p for p in outdir.glob("tinyworld_*.json") if "_scores" not in p.name)
    return manifest


def score(manifests: dict[str, Path], outdir: Path) -> None:
    """Score all models' images by the oracle, by eval/score.py."""
    command, paths = program("eval/score.py"), manifests.values()
    run(command, "scoring", *paths, scorers="oracle", outdir=outdir)


def compare(manifests: dict[str, Path], outdir: Path) -> None:
    """Compare every model with every other, with report.html, by eval/compare.py."""
    from sdpo.lab.quickstart.figures import LABELS

    # The last two are what the page shows first.
    named = [f"{LABELS.get(name, name)}={manifests[name]}" for name in reversed(manifests)]
    command = program("eval/compare.py")
    run(command, "comparison", json=named, scorers="oracle", outdir=outdir)

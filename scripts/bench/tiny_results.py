"""The quickstart over methods and seeds: held-out drifts and oracle scores, mean and spread.

    bash scripts/bench/tiny_results.sh [--methods diffusion-dpo ...] [--seeds 0 1 2] [--out DIR]

Writes OUT/METHOD-SEED/ for each run, and OUT/results.json and OUT/results.md over all of them. Runs
that are complete are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import write_json, write_text
from sdpo.lab.quickstart.run import RECIPES, ROOT, SUMMARY_FILE

COLUMNS = (
    ("winner_drift_percent", "winner drift, %", "+.1f"),
    ("loser_drift_percent", "loser drift, %", "+.1f"),
    ("implicit_acc", "implicit acc.", ".2f"),
    ("oracle", "oracle score", ".3f"),
    ("wins_over_base_percent", "beats base, %", ".0f"),
    ("loser_scale", "scale", ".2f"),
)
LABELS = {"plain": "without", "safeguard": "with"}


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("output/tiny_results"))
    args = parser.parse_args()
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds must be different numbers of at least 0, got {args.seeds}")
    return args


def run_once(method: str, seed: int, out: Path) -> dict[str, dict[str, Any]]:
    """One quickstart, unless it is there; its rows by model.

    Raises:
        UserError: it failed; what it printed is above.
    """
    if not (out / SUMMARY_FILE).is_file():
        print(f"\n== {method}, seed {seed}", flush=True)
        flags = ["--method", method, "--seed", str(seed), "--out", str(out)]
        command = [sys.executable, "-m", "sdpo.lab.quickstart.run", *flags]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise UserError(f"{method}, seed {seed} failed (see above); run the same command again")
    rows = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))["rows"]
    return {row["model"]: row for row in rows}


def spread(values: list[float], form: str) -> str:
    """Mean and the least and largest value."""
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        text += f" ({min(values):{form}} to {max(values):{form}})"
    return text


def table(runs: dict[str, list[dict[str, dict[str, Any]]]]) -> str:
    """Markdown: a row for each method without and with the safeguard."""
    titles = ["method", "safeguard", *(title for _, title, _ in COLUMNS)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for method, seeds in runs.items():
        for model, label in LABELS.items():
            cells = [spread([rows[model][key] for rows in seeds], f) for key, _, f in COLUMNS]
            lines.append(f"| {method} | {label} | " + " | ".join(cells) + " |")
    base = next(iter(runs.values()))[0]["base"]
    lines.append(f"\nBase model's oracle score on the same prompts: {base['oracle']:.3f}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing, write and print the table."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {
        method: [run_once(method, seed, args.out / f"{method}-{seed}") for seed in args.seeds]
        for method in args.methods
    }
    write_json(args.out / "results.json", {"seeds": args.seeds, "runs": runs})
    text = table(runs)
    write_text(args.out / "results.md", text)
    print("\n" + text + f"\nwrote {args.out / 'results.json'} and results.md")
    return 0


if __name__ == "__main__":
    run_main(main, "tiny_results")

"""The page of `python -m sdpo.lab tiny`: its questions, with tables and pictures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo.lab.audit.run import SUMMARY_FILE
from sdpo.lab.audit.summary import MEASURED_ON
from sdpo.lab.report import Cell, Section, Table, write_report
from sdpo.lab.sweep.file import Sweep
from sdpo.lab.sweep.results import RESULTS_FILE, read_results, summarise

REPORT_FILE = "report.html"
ABOUT = (
    "Everything here was measured by the commands beside it, on the tiny world. Errors are of "
    "held-out pairs, drifts in percent of the reference's error, the oracle's score is between 0 "
    "and 1. Intervals: 95 %, Student's t over seeds for runs, percentile bootstrap over batches or "
    "pairs for audits. docs/LAB.md says what was found, docs/METHOD.md what could be expected."
)
QUESTIONS = {
    "treatments": (
        "Is the safeguard better than a fixed scale? Does its scope or space matter? How does the "
        "scale evolve?",
        "The same training with the losers' gradient as it is, at two fixed scales, and with the "
        "safeguard per micro-batch, per pair and over the parameters.",
    ),
    "dmpo": ("Does it do the same for DMPO?", "At the strengths of its SD1.5 recipe."),
    "dspo": (
        "Does it do the same for DSPO? Why one form per base model?",
        "Both forms on one base: that of SD1.5 at the beta of its recipe and at that of SDXL's, "
        "and that of SDXL without and with the safeguard.",
    ),
    "map": (
        "How do mu and beta interact?",
        "Diffusion-DPO with the safeguard per micro-batch, one run a cell.",
    ),
    "horizon": (
        "Does it hold ten times as long?",
        "Ten times the quickstart's optimizer steps, of fewer pairs each, without and with the "
        "safeguard.",
    ),
    "flow": (
        "Is the pathology there in a transformer under rectified flow, and does the safeguard cure "
        "it? Does its scope matter there?",
        "The same pairs, from a tiny SD3 that predicts velocities, whose two scopes differ.",
    ),
    "flow-map": (
        "How do mu and beta interact in a transformer under rectified flow?",
        "Diffusion-DPO with the safeguard per pair, one run a cell.",
    ),
    "losers": (
        "Does it do to train on some of the losers, drawn by chance?",
        "The tiny SD3 again: the losers of all pairs, of one in two and of one in four.",
    ),
}
AUDITS = {
    "audit-start": "at the start, where model and reference are the same",
    "audit-without": "a quarter through training without the safeguard",
    "audit-flow-start": "in the transformer, at the start",
    "audit-flow-without": "in the transformer, a quarter through training without the safeguard",
}
PICTURES = {
    "drift.png": "Held-out drift and margin over steps",
    "scale.png": "Scale of the losers' gradient over steps and by timestep, and training drift by "
    "timestep",
    "map.png": "Final held-out winner drift by mu and beta",
    "map_oracle.png": "Final held-out winner drift and the oracle's score by mu and beta",
    "horizon.png": "Winner drift and the oracle's score over a long run",
    "strips.png": "The same prompts and noise over the checkpoints of a long run",
    "updates_own.png": "One update's effect on the batch that it is made of",
    "updates_next.png": "The same update's effect on the next batch",
    "updates_own_by_timestep.png": "On its own batch, by timestep",
    "updates_next_by_timestep.png": "On the next batch, by timestep",
    "jacobian.png": "Gradients over the parameters against residuals, pair by pair",
    "spectrum.png": "Spectrum of J J^T, and the branches' Jacobians apart",
}


def write(
    out: Path,
    sweeps: Sequence[tuple[Path, Sweep]],
    audits: Mapping[str, Sequence[str]],
) -> Path:
    """Write OUT/report.html; returns its path.

    Args:
        sweeps: with their files; each has run into OUT/NAME.
        audits: the commands of those that have run, by the name of their directory in OUT.
    """
    sections = [_sweep(out / sweep.name, path, sweep) for path, sweep in sweeps]
    sections += [_audit(out / name, name, command) for name, command in audits.items()]
    page = out / REPORT_FILE
    write_report(page, "The safeguard lab on the tiny world", ABOUT, sections)
    return page


def _sweep(directory: Path, path: Path, sweep: Sweep) -> Section:
    title, about = QUESTIONS.get(sweep.name, (sweep.name, ""))
    rows = summarise(read_results(directory / RESULTS_FILE), sweep.groups)
    command = shlex.join(["python", "-m", "sdpo.lab", "sweep", str(path), "--out", str(directory)])
    tables = {"At the end of training, mean over seeds [interval]": [_spread(r) for r in rows]}
    return Section(title, about, command, tables, _pictures(directory / "figures"))


def _pictures(directory: Path) -> dict[Path, str]:
    return {directory / n: about for n, about in PICTURES.items() if (directory / n).is_file()}


def _spread(row: dict[str, Any]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"": row["group"], "seeds": row["runs"]}
    for name, found in row.items():
        if isinstance(found, dict):
            cells[name.replace("_", " ").replace(" percent", ", %")] = _interval(
                found["mean"], found["interval"]
            )
    return cells


def _interval(mean: float | None, interval: Sequence[float] | None) -> str | None:
    if mean is None:
        return None
    return f"{mean:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def _audit(directory: Path, name: str, command: Sequence[str]) -> Section:
    summary = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    tables: dict[str, Table] = {}
    for on, about in MEASURED_ON.items():
        tables[f"Winners' error, {about}, in %: to first order [interval] / after the step"] = (
            _update_rows([r for r in summary["updates"] if r["on"] == on])
        )
    tables["Pair by pair, means [interval]"] = _jacobian_rows(summary["jacobian"])
    tables["Spectrum of J J^T over its mean, and the two branches' Jacobians"] = [
        {k: v for k, v in pair.items() if not isinstance(v, list)} for pair in summary["spectrum"]
    ]
    return Section(
        "Does an update raise the winners' error, and do the assumptions hold: "
        + AUDITS.get(name, name),
        "Treatments of the losers with their mean scale; 'rising' is the share of batches whose "
        "winners' error would rise to first order.",
        shlex.join(["python", *command[1:]]),
        tables,
        _pictures(directory),
    )


def _update_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Cell]]:
    by_mode: dict[str, dict[str, Cell]] = {}
    for row in rows:
        cells = by_mode.setdefault(row["mode"], {"losers": row["mode"], "scale": row["scale"]})
        cells[f"{row['update']}: rising, %"] = row["rising_first_order"]
        cells[f"{row['update']}: change"] = (
            f"{_interval(row['first_order'], row['first_order_interval'])} / {row['realised']:.3g}"
        )
    return list(by_mode.values())


def _jacobian_rows(found: dict[str, Any]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = [
        {"": name.replace("_", " "), "value": _interval(value["mean"], value["interval"])}
        for name, value in found["means"].items()
    ]
    for name in ("cosine_correlation", "scale_correlation"):
        label = f"{name.replace('_', ' ')}, output and parameters"
        rows.append({"": label, "value": _interval(found[name], None)})
    return rows

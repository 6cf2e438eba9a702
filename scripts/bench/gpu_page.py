"""The page that gpu.py writes of its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.bench import step


def markdown(about: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Write results, whole or as far as they go, as a page."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [f"# {result['device']}", "", f"`{about['command']}`, {about['date']}", ""]
    lines += [f"{versions}.", ""]
    if "tests" in result:
        lines += ["## Tests", "", *_tests(result["tests"]), ""]
    peak = result.get("matrix_peak")
    if peak:
        lines += [f"A large matrix product in bf16 reaches {peak / 1e12:.1f} TFLOP/s.", ""]
    for name, scene in result.get("scenes", {}).items():
        lines += [f"## {name}", "", *_table(scene, peak), "", *_notes(scene), ""]
    return "\n".join(lines)


def _tests(tests: Mapping[str, Any]) -> list[str]:
    if "left_out" in tests:
        return [f"Left out: {tests['left_out']}."]
    code, skipped, failed = tests["exit_code"], tests["skipped"], tests["failed"]
    ended = "; cut off by the time limit" if code is None else f"; exit code {code}"
    line = f"{tests['passed']} passed, {len(skipped)} skipped, {len(failed)} failed{ended}."
    lines = [line, ""]
    lines += [f"- failed: `{name}`: {why}" for name, why in failed.items()]
    for reason in sorted(set(skipped.values())):
        names = [name.rpartition("::")[2] for name, why in skipped.items() if why == reason]
        lines.append(f"- skipped ({reason}): {', '.join(names)}")
    if tests["not_run"]:
        lines.append(f"- not run: {tests['not_run']}, the first of them {tests['under_way']}")
    return lines


def _table(scene: Mapping[str, Any], peak: float) -> list[str]:
    head = ["variant", *(f"time / {base}" for base in step.BASELINES), "s a step", "pairs/s"]
    head += ["peak GiB", "computed GiB", "TFLOP/s", "of the peak"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant, entry in scene["variants"].items():
        ratios = [entry.get(f"time_to_{base}") for base in step.BASELINES]
        computed, speed = entry["computed_gib"], entry["flops_per_s"]
        cells = [variant, *("" if r is None else f"{r:.2f}" for r in ratios)]
        cells += [f"{entry['seconds']['median']:.3f}", f"{entry['pairs_per_s']:.2f}"]
        cells += [f"{entry['peak_memory_gib']:.1f}", "" if computed is None else f"{computed:.1f}"]
        cells += ["", ""] if speed is None else [f"{speed / 1e12:.1f}", f"{speed / peak:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(scene: Mapping[str, Any]) -> list[str]:
    lines = []
    if plain := scene["variants"].get(step.PLAIN):
        for scope, seconds in scene["safeguard_seconds"].items():
            share = seconds / plain["seconds"]["median"]
            lines.append(
                f"- The safeguard's rule, scope {scope}: {1e6 * seconds:.0f} microseconds, "
                f"{share:.4%} of a plain step."
            )
    lines += [f"- {variant} failed: {said}" for variant, said in scene["failed"].items()]
    lines += [f"- {variant} left out: {said}" for variant, said in scene["left_out"].items()]
    if scene["cut"]:
        lines.append(f"- Cut by the time limit: {', '.join(scene['cut'])}.")
    return lines

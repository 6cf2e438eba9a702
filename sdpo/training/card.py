"""The model card, README.md: what a model is, how it was made and how it is used, for people and
for the hub. All of it is read from what the run left on disk: a figure stands there where it was
measured, a licence where the base's own card says it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import yaml

from sdpo.common.files import write_text
from sdpo.config.families import FAMILIES
from sdpo.models.locations import hub_id
from sdpo.models.lora import LORA_FILE
from sdpo.training.card_use import Weights, code
from sdpo.training.checkpoint_paths import UNET_FILE, latest_checkpoint
from sdpo.training.made import CARD_FILE, Made, base_licence, read_made, recipe
from sdpo.training.runlog import HELDOUT_EMA_FILE, HELDOUT_FILE

log = logging.getLogger(__name__)

_MARK = re.compile(r"<!-- sdpo:([0-9a-f]{16})[^\n]*-->\n\n")
# What the hub calls the families.
_TAGS = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl", "sd3": "stable-diffusion-3"}
_TITLES = {"pipeline": "", "single_file": "", "lora": "LoRA on the base", "unet": "A checkpoint"}


def write_run_card(run: Path) -> Path | None:
    """Write the card of a run that has a checkpoint into its directory; returns its path, None
    where it was not written (see `write_card`)."""
    newest = latest_checkpoint(run)
    if newest is None:
        return None
    made = read_made(newest)
    there = []
    if (run / "pipeline").is_dir():
        ema = "pipeline_ema/" if (run / "pipeline_ema").is_dir() else ""
        there.append(Weights("pipeline", "pipeline", ema))
    if (run / LORA_FILE).is_file() and made.config.model.unet_init is None:
        there.append(Weights("lora", LORA_FILE))
    there.append(Weights("unet", f"{newest.name}/{UNET_FILE}"))
    return write_card(run, card_text(made, there))


def edited_card(directory: Path) -> bytes | None:
    """Read the card in a directory if somebody wrote or edited it; None for one as `card_text` made
    it, or none at all."""
    path = directory / CARD_FILE
    card = path.read_bytes() if path.is_file() else None
    return None if card is None or is_own(card.decode("utf-8", "replace")) else card


def write_card(directory: Path, text: str) -> Path | None:
    """Write a card, unless somebody wrote or edited the one that is there.

    Returns: the path, or None where the card was left as it is, which a warning tells.
    """
    path = directory / CARD_FILE
    if edited_card(directory) is not None:
        log.warning("%s was written or edited by somebody: it is left as it is", path)
        return None
    write_text(path, text)
    return path


def is_own(text: str) -> bool:
    """Say whether a card is as `card_text` made it."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()] + text[mark.end() :])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def card_text(made: Made, weights: Sequence[Weights], repo: str | None = None) -> str:
    """Write a card.

    Args:
        weights: the ways in which the model lies beside the card.
        repo: hub id of the repository that the card lies in.
    """
    front, licence = _front(made, weights, repo)
    body = [
        f"# {(repo or made.run.name).split('/')[-1]}",
        _summary(made),
        _table(made),
        *_pictures(made),
        "## Use",
        *_uses(made, weights, repo),
        "## Recipe",
        "What differs from the defaults, and what is essential, as a file for `--config_file`:",
        f"```yaml\n{yaml.safe_dump(recipe(made.config), sort_keys=False, width=100)}```",
        "## Held-out pairs",
        *_heldout(made),
        "## Versions",
        _versions(made),
        "## Licence",
        licence,
    ]
    head, text = f"---\n{front}---\n\n", "\n\n".join(body) + "\n"
    about = "this card is written anew as long as nobody edits it"
    return f"{head}<!-- sdpo:{_digest(head + text)} {about} -->\n\n{text}"


def _front(made: Made, weights: Sequence[Weights], repo: str | None) -> tuple[str, str]:
    """The hub's metadata, and the sentence on the licence."""
    model, method = made.config.model, made.config.method.train_method
    found = base_licence(made.config)
    base, data = hub_id(model.pretrained_model_name_or_path), hub_id(made.config.data.dataset_name)
    adapters = {"lora"} & {one.kind for one in weights}
    family = _TAGS.get(made.family, made.family)
    front = {
        **(found or {"license": "other"}),
        **({"base_model": base} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", family, *sorted(adapters), method, "sdpo"],
        **({"datasets": [data]} if data else {}),
    }
    if found:
        licence = f"That of the base: {found.get('license_name') or found['license']}."
    elif base:
        licence = f"The base's licence: see https://huggingface.co/{base}"
    else:
        licence = "The base's licence, which this card could not look up."
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True), licence


def _summary(made: Made) -> str:
    config = made.config
    label = FAMILIES[made.family].label
    guard = " with the winner-preserving safeguard" * config.safeguard.use_winner_preserving
    average = " The weights are the moving average." * made.averaged
    return (
        f"A text-to-image model ({label}), trained by {config.method.train_method}{guard} for "
        f"{_count(made.step, 'optimizer step')} on pairs of a preferred and a less preferred "
        f"image.{average}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(made: Made) -> str:
    config, resolved = made.config, made.about.get("resolved", {})
    model, method, guard = config.model, config.method, config.safeguard
    base = [_shown(model.pretrained_model_name_or_path)]
    base += [f"revision {model.revision}"] if model.revision else []
    base += [f"VAE {_shown(v)}"] if (v := model.pretrained_vae_model_name_or_path) else []
    base += [f"UNet {_shown(model.unet_init)}"] if model.unet_init else []
    base += [f"LoRA {_shown(model.lora_init)}"] if model.lora_init else []
    source = import_module(f"sdpo.losses.{method.train_method.replace('-', '_')}").__doc__ or ""
    paper = " ".join(source.split("\n\n")[0].split())
    rows = {"Base": ", ".join(base), "Data": _data(made), "Method": paper}
    rows["Safeguard"] = "none"
    if guard.use_winner_preserving:
        rows["Safeguard"] = (
            f"winner-preserving (arXiv 2511.03317), mu {guard.winner_preserving_mu:g}, scope "
            f"{guard.winner_preserving_scope}, space {guard.winner_preserving_space}"
        )
    elif guard.loser_scale_fixed is not None:
        rows["Safeguard"] = f"the loser's gradient times {guard.loser_scale_fixed:g}"
    if guard.losers_one_in > 1:
        rows["Losers"] = f"of one pair in {guard.losers_one_in}, drawn by chance"
    if model.lora_rank:
        kind = "DoRA" if model.use_dora else "LoRA"
        rows["Adapters"] = f"{kind}, rank {model.lora_rank}, alpha {model.lora_alpha:g}"
        if model.quantize_base:
            rows["Adapters"] += f", trained over the base in {model.quantize_base}"
    steps = [_count(made.step, "step")]
    if resolved.get("pairs_per_step"):
        steps[0] += f" of {_count(resolved['pairs_per_step'], 'pair')}"
        steps.append(f"processes: {resolved['processes']}")
    rows["Training"] = ", ".join([*steps, f"mixed precision: {config.optim.mixed_precision}"])
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _data(made: Made) -> str:
    data = made.config.data
    count = _count(made.pairs, "decided pair") if made.pairs else "pairs read as a stream"
    crop = "random" if data.random_crop else "centre"
    square = f"{data.resolution} x {data.resolution} px"
    shape = f"rectangles of about the area of {square}" if data.resize == "bucket" else square
    flips = "" if data.no_hflip else ", flipped at random"
    parts = [
        f"{_shown(data.location)}, split {data.split}, {count}",
        f"images resized and cropped ({crop}) to {shape}{flips}",
        f"{data.proportion_empty_prompts:.0%} of the captions left out",
    ]
    if data.choice_model:
        parts.insert(1, f"labelled by {data.choice_model}")
    return "; ".join(parts)


def _shown(name: str) -> str:
    """A link to the hub, or the last part of a path on the machine of the run."""
    base = hub_id(name)
    return f"[{base}](https://huggingface.co/{base})" if base else f"{Path(name).name} (local)"


def _pictures(made: Made) -> list[str]:
    if made.picture is None:
        return []
    place = made.picture.relative_to(made.run).as_posix()
    prompts = "; ".join(made.config.run.validation_prompts)
    step = int(made.picture.stem.removeprefix("step-"))
    return [f"![Samples]({place})", f"*Samples after step {step}, row by row: {prompts}*"]


def _uses(made: Made, weights: Sequence[Weights], repo: str | None) -> list[str]:
    config, parts = made.config, []
    for one in weights:
        program = code(one, config.model, made.family, config.data.resolution, repo, made.absent)
        title = _TITLES[one.kind]
        parts += [f"{title}:"] if title and len(weights) > 1 else []
        parts.append(f"```python\n{program}\n```")
    if not repo:
        parts.insert(0, "In this directory:")
    if weights[0].ema:
        parts.append(f"`{weights[0].ema}` holds the moving averages in place of the last weights.")
    if made.family == "sd15" and weights[0].kind == "pipeline":
        parts.append("The pipeline has no safety checker.")
    return parts


def _heldout(made: Made) -> list[str]:
    parts = []
    for file, what in ((HELDOUT_FILE, ""), (HELDOUT_EMA_FILE, " of the moving averages")):
        path = made.run / file
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [row for row in map(json.loads, lines) if row["step"] <= made.step]
        if not rows:
            continue
        parts.append(
            f"Errors{what} on {rows[0]['pairs']} pairs at {rows[0]['timesteps']} timesteps each, "
            "as `sdpo.evaluation.heldout` measured them: drift is the change against the model "
            "that the run started from, in percent of its error, ± one standard error."
        )
        table = [
            "| step | winner drift, % | loser drift, % | implicit accuracy |",
            "|---|---|---|---|",
        ]
        table += [
            f"| {row['step']} | {row['winner_drift_percent']:+.3g} ± "
            f"{row['winner_drift_percent_se']:.2g} | {row['loser_drift_percent']:+.3g} | "
            f"{row['implicit_acc']:.3f} |"
            for row in rows
        ]
        parts.append("\n".join(table))
    return parts or ["Not measured."]


def _versions(made: Made) -> str:
    packages = {"Python": made.about.get("python"), **made.about.get("packages", {})}
    told = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    revision = made.about.get("git_revision")
    return f"{told or 'Not recorded'}{f'; sdpo at {revision}' if revision else ''}."

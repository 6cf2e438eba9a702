"""What a finished checkpoint is and how it was made, read from what its run left on disk."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdpo.common.flags import from_flat
from sdpo.config import TrainConfig
from sdpo.config.families import FAMILIES
from sdpo.config.rules import fill_in
from sdpo.models.checks import text_parts
from sdpo.models.locations import hub_id
from sdpo.training.checkpoint_paths import STATE_FILE, step_of
from sdpo.training.runlog import CONFIG_FILE, read_config

CARD_FILE = "README.md"
_LICENCE = ("license", "license_name", "license_link")
# Flags that a reader wants to know although they are the defaults.
_ESSENTIAL = (
    *("sdxl", "lora_rank", "train_method", "beta_dpo", "use_winner_preserving"),
    *("winner_preserving_mu", "winner_preserving_scope", "learning_rate", "scale_lr"),
    *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "resolution"),
    *("mixed_precision", "seed"),
)
# Flags that say where things lie on the machine of the run, or how it is watched.
_PLACES = (
    *("train_data_dir", "image_root", "cache_dir", "cache_dir_latents", "choice_weights"),
    *("output_dir", "logging_dir", "resume_from_checkpoint", "report_to", "tracker_project_name"),
    *("validation_prompts", "validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "lora_init", "cache_reference"),
)
# Flags that name a place on the hub or on the machine.
_NAMES = (
    *("pretrained_model_name_or_path", "single_file_config", "pretrained_vae_model_name_or_path"),
    *("unet_init", "dataset_name"),
)


@dataclass(frozen=True)
class Made:
    """What a run left of itself and of one of its checkpoints."""

    checkpoint: Path
    config: TrainConfig
    about: dict[str, Any] = field(default_factory=dict)  # config.json
    pairs: int | None = None
    averaged: bool = False  # whether the weights are the moving averages

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.checkpoint.resolve().parent

    @property
    def family(self) -> str:
        """The name of the base's family."""
        sdxl = "sdxl" if self.config.model.sdxl else "sd15"
        return str(self.about.get("resolved", {}).get("family", sdxl))

    @property
    def absent(self) -> tuple[str, ...]:
        """The optional parts that the base has not, which diffusers wants to be told."""
        index = Path(self.config.model.pretrained_model_name_or_path) / "model_index.json"
        if not index.is_file():
            return ()
        text = FAMILIES[self.family].text
        there = text_parts(self.family, json.loads(index.read_text(encoding="utf-8")))
        gone = [(folder, part.tokenizer) for folder, part in text.items() if folder not in there]
        return tuple(name for names in gone for name in names)

    @property
    def step(self) -> int:
        """The optimizer steps that were done."""
        return step_of(self.checkpoint)

    @property
    def picture(self) -> Path | None:
        """The last sample grid that was drawn by then."""
        grids = sorted((self.run / "samples").glob("step-*.png"))
        seen = [grid for grid in grids if int(grid.stem.removeprefix("step-")) <= self.step]
        return seen[-1] if seen and self.config.run.validation_prompts else None


def read_made(checkpoint: Path, averaged: bool = False) -> Made:
    """Read what there is to tell about a complete checkpoint, or about its moving averages."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    run = checkpoint.resolve().parent
    about = read_config(run) if (run / CONFIG_FILE).is_file() else {}
    config = from_flat(TrainConfig, fill_in(state["args"]))
    pairs = (state.get("data") or {}).get("pairs")
    pairs = pairs or about.get("resolved", {}).get("pairs")
    return Made(checkpoint, config, about, pairs, averaged)


def recipe(config: TrainConfig) -> dict[str, Any]:
    """Choose the flags that make a run what it is: those that are not the defaults, and the
    essential ones; none that is a path on the machine of the run."""
    values = config.flags()
    given = {name: values[name] for name in ("sdxl", "lora_rank") if values[name]}
    plain = from_flat(TrainConfig, fill_in(given)).flags()
    told = {}
    for name, value in values.items():
        place = name in _PLACES or (name in _NAMES and not hub_id(value))
        if not place and (name in _ESSENTIAL or value != plain[name]):
            told[name] = value
    return {name: value for name, value in told.items() if value is not None}


def base_licence(config: TrainConfig) -> dict[str, str] | None:
    """Look up the licence in the base's own card, where that is on this machine.

    Returns: the hub's `license`, with license_name and license_link where there are; or None.
    """
    from huggingface_hub import try_to_load_from_cache

    model = config.model
    card: Any = Path(model.pretrained_model_name_or_path) / CARD_FILE
    if base := hub_id(model.pretrained_model_name_or_path):
        cache, revision = config.data.cache_dir, model.revision
        card = try_to_load_from_cache(base, CARD_FILE, cache_dir=cache, revision=revision)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    text = Path(card).read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("license"), str):
        return None
    return {name: str(values[name]) for name in _LICENCE if values.get(name)}

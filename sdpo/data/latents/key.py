"""Say what a cache depends on, and what differs where one does not fit a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.images import READING
from sdpo.config import TrainConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.data.latents.identity import dataset_digest, text_digest, vae_digest
from sdpo.data.source import PairSource
from sdpo.models.base import Family, ModelSource

# To be changed with `PairTransform`, so that what was encoded by another version is not taken.
TRANSFORM = f"{READING}; shorter side resized bilinearly, centre crop, 1"
# What keys have that do not name it.
_BEFORE = {"resize": "crop"}
# Names of sources, to be said beside a digest; not compared, since a model may lie elsewhere now.
_MADE_OF = "made_of"


def make_key(
    config: TrainConfig, family: Family, source: ModelSource, pairs: PairSource
) -> dict[str, Any]:
    """Make the key of the cache that a run needs, from the files of VAE and text encoders.

    Captions are not in it: a text is filed under the caption itself, so that other captions are
    encoded when they are needed.

    Raises:
        UserError: a model's files are not to be had.
    """
    data = config.data
    return ({"resize": data.resize} if data.resize != "crop" else {}) | {
        "family": family.name,
        "vae": vae_digest(source),
        "text": text_digest(family, source),
        "precision": config.optim.mixed_precision,
        "dtype": data.cache_dtype,
        "resolution": data.resolution,
        "transform": TRANSFORM,
        "flips": not data.no_hflip,
        "dataset": dataset_digest(pairs),
        _MADE_OF: {
            "vae": source.vae or source.base,
            "text": source.base,
            "dataset": f"{data.location} ({data.split}, {len(pairs.given)} rows)",
        },
    }


# Of what is there {0} and of the run {1}; of what they are made {2} and {3}.
_PHRASES = {
    "family": "family {0} (this run: {1})",
    "precision": "--mixed_precision {0} (this run: {1})",
    "dtype": "--cache_dtype {0} (this run: {1})",
    "resolution": "--resolution {0} (this run: {1})",
    "resize": "--resize {0} (this run: {1})",
    "transform": "another version's way from files to pixels, {0!r} (this run: {1!r})",
    "flips": "--no_hflip (this run flips)",
    "vae": "another VAE, then of {2} (this run: {3})",
    "text": "other text encoders or tokenizers, then of {2} (this run: {3})",
    "dataset": "other images, then of {2} (this run: {3})",
}


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Say what keeps a run from using a cache, one phrase each. A cache with flips serves a run
    without."""
    there, wanted = _BEFORE | there, _BEFORE | wanted
    changed = [name for name in _PHRASES if there[name] != wanted[name]]
    if "family" in changed:
        # All else differs too then, and would only hide the reason.
        changed = ["family"]
    if there["flips"] and "flips" in changed:
        changed.remove("flips")
    made = there[_MADE_OF], wanted[_MADE_OF]
    return [
        _PHRASES[name].format(there[name], wanted[name], *(of.get(name) for of in made))
        for name in changed
    ]


def check_key(directory: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a cache that was made for something else.

    Raises:
        UserError: saying all that differs.
    """
    found = differences(there, wanted)
    if found:
        raise UserError(
            f"{CACHE_FLAG}: {directory} was made with {'; '.join(found)}; give another directory, "
            "or delete this one to have it made anew"
        )

"""Say what a cache depends on, and what differs where one does not fit a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.config import TrainConfig
from sdpo.config.data import CACHE_FLAG
from sdpo.data.latents.identity import dataset_digest, text_digest, vae_digest
from sdpo.data.source import PairSource
from sdpo.models.base import Family, ModelSource

# To be changed with `PairTransform`, so that what was encoded by another version is not taken.
TRANSFORM = "shorter side resized bilinearly, centre crop, 1"
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
    return {
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


_FLAGS = {
    "precision": "--mixed_precision",
    "dtype": "--cache_dtype",
    "resolution": "--resolution",
}
_PARTS = {
    "vae": "another VAE",
    "text": "other text encoders or tokenizers",
    "dataset": "other images",
}


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Say what keeps a run from using a cache, one phrase each. A cache with flips serves a run
    without."""
    changed = {name for name in wanted if there[name] != wanted[name]}
    if "family" in changed:
        # All else differs too then, and would only hide the reason.
        return [f"family {there['family']} (this run: {wanted['family']})"]
    found = [
        f"{flag} {there[name]} (this run: {wanted[name]})"
        for name, flag in _FLAGS.items()
        if name in changed
    ]
    if "transform" in changed:
        found.append(f"the transform {there['transform']!r} (this run: {wanted['transform']!r})")
    if wanted["flips"] and not there["flips"]:
        found.append("--no_hflip (this run flips)")
    then, now = there[_MADE_OF], wanted[_MADE_OF]
    return found + [
        f"{what}, then of {then[name]} (this run: {now[name]})"
        for name, what in _PARTS.items()
        if name in changed
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

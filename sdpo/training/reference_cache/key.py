"""Say what the reference's errors depend on, and what differs where a cache does not fit a run."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdpo.common.errors import UserError
from sdpo.common.files import make_directory, write_json
from sdpo.config import TrainConfig
from sdpo.config.model import REFERENCE_FLAG

log = logging.getLogger(__name__)

KEY_FILE = "key.json"
LOCK_FILE = "lock"
# Of the files, and of how a pair's time, noise and target come of its place.
FORMAT = 1
# Names of sources, to be said beside a digest; not compared, since they may lie elsewhere now.
MADE_OF = "made_of"
_FLAGS = (
    *("seed", "mixed_precision", "allow_tf32", "resolution", "resize", "random_crop", "no_hflip"),
    *("proportion_empty_prompts", "noise_offset", "input_perturbation"),
    *("time_sampling", "time_mean", "time_std", "time_shift", "quantize_base"),
)
_IF_NOT_SAID = {"time_sampling": "logit-normal", "time_mean": 0.0, "time_std": 1.0}
# Of what is there {0} and of the run {1}; of what they are made {2} and {3}. Others are flags.
_PHRASES = {
    "encodings": "encodings {0} (this run: {1})",
    "stride": "{0} pairs a step in all processes, by which --resize bucket orders (this run: {1})",
    "transform": "another version's way from files to pixels, {0!r} (this run: {1!r})",
    "schedule": "another noise schedule, then of {2} (this run: {3})",
    "vae": "another VAE, then of {2} (this run: {3})",
    "text": "other text encoders or tokenizers, then of {2} (this run: {3})",
    "pairs": "other pairs, labels or captions, then of {2} (this run: {3})",
    "images": "other images, then of {2} (this run: {3})",
    "reference": "another reference, then {2} (this run: {3})",
    "settings": "another configuration of the reference, then {2} (this run: {3})",
}
_FLAG_PHRASE = "--{name} {0} (this run: {1})"


def key_of_flags(config: TrainConfig) -> dict[str, Any]:
    """Make the part of the key that a run's flags alone tell."""
    flags, data = config.flags(), config.data
    key = {name: flags[name] for name in _FLAGS}
    key |= {name: value for name, value in _IF_NOT_SAID.items() if key[name] is None}
    key["encodings"] = f"kept in {data.cache_dtype}" if data.cache_dir_latents else "not kept"
    return key


def key_digest(key: dict[str, Any]) -> str:
    """Hash a whole key, 16 hex digits."""
    compared = {name: value for name, value in key.items() if name != MADE_OF}
    text = json.dumps({"format": FORMAT, **compared}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_key(directory: Path, key: dict[str, Any]) -> bool:
    """Compare a key, or the part of it that is known yet, with that of a cache.

    Returns:
        Whether there is one.

    Raises:
        UserError: it was made for something else, saying all that differs; or cannot be read.
    """
    path = directory / KEY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        format_, there = content["format"], dict(content["key"])
        made = {name: dict(of.get(MADE_OF, {})) for name, of in (("0", there), ("1", key))}
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{REFERENCE_FLAG}: {path} cannot be read ({error}); delete {directory} to have it "
            "made anew"
        ) from None
    if format_ != FORMAT:
        raise UserError(
            f"{REFERENCE_FLAG}: {directory} holds a cache of format {format_}, this version reads "
            f"{FORMAT}; give another directory"
        )
    wanted = json.loads(json.dumps(key, default=str))
    found = [
        _PHRASES.get(name, _FLAG_PHRASE).format(
            *(there.get(name), value, made["0"].get(name), made["1"].get(name)), name=name
        )
        for name, value in wanted.items()
        if name != MADE_OF and there.get(name) != value
    ]
    if found:
        raise UserError(
            f"{REFERENCE_FLAG}: {directory} was made with {'; '.join(found)}; give another "
            "directory, or delete this one to have it made anew"
        )
    return True


def claim(directory: Path, key: dict[str, Any]) -> None:
    """Note the whole key in a new cache, or check that of one that is there. By one process alone.

    Raises:
        UserError: see `check_key`; or the directory cannot be made.
    """
    if check_key(directory, key):
        return
    make_directory(directory, REFERENCE_FLAG)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(directory / LOCK_FILE))
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): begin it by one run alone", directory, error)
        if not check_key(directory, key):
            write_json(directory / KEY_FILE, {"format": FORMAT, "key": key})

"""Which runs of a sweep share the reference's errors (train.py's --cache_reference)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from sdpo.common.flags import flag_names
from sdpo.config import TrainConfig
from sdpo.lab.sweep.file import PlannedRun
from sdpo.losses import needs_reference_output

CACHES = "reference-cache"
# What neither the errors nor how they are rounded depend on: these sections but what is named, and
_FREE_BUT = {
    "safeguard": (),
    "run": ("seed",),
    "optim": ("train_batch_size", "mixed_precision", "allow_tf32", "channels_last", "compile"),
}
# of the others these flags.
_FREE = (
    *("train_method", "beta_dpo", "dmpo_alpha", "dspo_form"),
    *("use_ema", "ema_decay", "offload_reference", "offload_text_encoders"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora"),
)


def shared_caches(runs: Iterable[PlannedRun]) -> dict[str, str]:
    """Name the cache of each run, by the run's name, that would find its errors equal to the bit in
    another's; others have none.

    No run waits for the one that fills its cache, which would leave a job idle: of runs at the same
    time those behind read what the one ahead has added, so that each error is computed about once.
    """
    groups: dict[str, list[str]] = {}
    for run in runs:
        config = run.config
        if not (needs_reference_output(config.method.train_method) or config.data.streaming):
            groups.setdefault(_digest(config), []).append(run.name)
    return {name: group for group, names in groups.items() if len(names) > 1 for name in names}


def _digest(config: TrainConfig) -> str:
    sections = flag_names(TrainConfig)
    decisive = {
        name: value
        for name, value in config.flags().items()
        if name not in _FREE and name in _FREE_BUT.get(sections[name], (name,))
    }
    text = json.dumps(decisive, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

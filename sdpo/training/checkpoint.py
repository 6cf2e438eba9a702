"""Checkpoints of a run and what its end leaves: written beside and renamed, so that one that is
there is whole.

checkpoint-N/ holds      always                       with --lora_rank
                         unet.pth, optimizer.pt,      pytorch_lora_weights.safetensors
                         state.json
with --use_ema also      unet_ema.pth                 pytorch_lora_weights_ema.safetensors

The .pth files are plain state dicts of a UNet, adapters computed in. A run ends with pipeline/,
with --use_ema pipeline_ema/, and beside them the files of the second column.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdpo.common.errors import UserError, first_line
from sdpo.common.files import rename_complete, replace_directory, write_json, written_beside
from sdpo.common.text_encoders import name_for_all_versions
from sdpo.data.order import Place
from sdpo.models.loading import load_strictly, read_state_dict
from sdpo.models.lora import LORA_FILE, has_adapters, load_adapters, merged_state, save_adapters
from sdpo.training.checkpoint_paths import (
    EMA_FILE,
    STATE_FILE,
    UNET_FILE,
    checkpoint_dir,
    list_checkpoints,
)
from sdpo.training.state import Models, Progress

if TYPE_CHECKING:
    from sdpo.config import TrainConfig
    from sdpo.models import Base
    from sdpo.models.ema import Ema

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.pt"
_EMA = "_ema"
EMA_LORA_FILE = f"{Path(LORA_FILE).stem}{_EMA}.safetensors"
# A checkpoint made under other values of these is of another run.
SAME_RUN = (
    "train_method",
    "dspo_form",
    "seed",
    "use_adafactor",
    "use_8bit_adam",
    "streaming",
    "choice_model",
    "lora_rank",
    "lora_alpha",
    "lora_init",
    "lora_target_modules",
    "use_dora",
    "quantize_base",
    "use_ema",
)
_MAY_DIFFER = {
    *("resume_from_checkpoint", "max_train_steps", "num_train_epochs", "output_dir"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "cache_reference"),
}


def save_checkpoint(
    config: TrainConfig,
    progress: Progress,
    models: Models,
    training: dict[str, Any],
    data: dict[str, Any] | None = None,
) -> Path:
    """Write `checkpoint-N/` (by one process alone) and delete what is beyond
    --checkpoints_total_limit; one that is there is left as it is.

    Args:
        models: with the UNet unwrapped and whole, as `sdpo.training.sharding.gathered` gives them.
        training: state dicts of optimizer, scheduler and, in fp16, gradient scaler.
        data: what `sdpo.data.digest.describe_pairs` said.
    """
    output_dir, limit = Path(config.run.output_dir), config.run.checkpoints_total_limit
    final = checkpoint_dir(output_dir, progress.step)
    if final.exists():
        return final
    beside = final.with_name(final.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _save_weights(models, beside, UNET_FILE, LORA_FILE)
    if models.ema is not None:
        training = {**training, "ema": {"steps": models.ema.steps}}
        with models.ema.applied():
            _save_weights(models, beside, EMA_FILE, EMA_LORA_FILE)
    torch.save(training, beside / OPTIMIZER_FILE)
    state = {"step": progress.step, "place": list(progress.place), "args": config.flags()}
    state |= {"reference": models.reference_digest, "base": models.settings, "data": data}
    write_json(beside / STATE_FILE, state)
    rename_complete(beside, final)
    log.info("saved %s", final)
    if limit is not None:
        for old in list_checkpoints(output_dir)[:-limit]:
            _remove(old)
    return final


def _save_weights(models: Models, directory: Path, plain: str, adapters: str) -> None:
    state = {k: v.detach().cpu().contiguous() for k, v in plain_state(models).items()}
    torch.save(state, directory / plain)
    if has_adapters(models.unet):
        save_adapters(models.unet, directory / adapters)


def plain_state(models: Models) -> dict[str, Tensor]:
    """The state dict of a plain UNet that computes what that of `models` does.

    Adapters are computed into the weights that the run started from, read again in float32 where
    the run holds them in half precision. With --quantize_base they are the quantised ones.
    """
    unet = models.unet
    if not has_adapters(unet):
        return unet.state_dict()
    if all(p.dtype == torch.float32 for p in unet.parameters()):
        return merged_state(unet)
    return merged_state(unet, models.base.family.load_unet(models.base.source).state_dict())


def _remove(path: Path) -> None:
    # Renamed first: a kill half-way through must not leave something that looks complete.
    doomed = path.with_name(path.name + ".tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_unfinished(output_dir: Path) -> None:
    """Delete what a killed run left half-written."""
    for path in output_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_progress(
    path: Path,
    config: TrainConfig,
    flag: str = "--resume_from_checkpoint",
    instead: str = "give another --output_dir, or the same flag",
) -> Progress:
    """Read where a checkpoint stands, checked to be of the same run.

    Args:
        flag: the one that named the checkpoint, and `instead` what to do if it does not fit.

    Raises:
        UserError: it was made with other flags than a resumed run can have.
    """
    state = read_state(path)
    now, then = config.flags(), state["args"]
    for name in SAME_RUN:
        # A flag that the program did not have yet was off.
        if (then.get(name) or None) != (now[name] or None):
            raise UserError(
                f"{flag}: {path} was made with --{name} {then.get(name)}, this run has "
                f"{now[name]}; {instead}"
            )
    changed = [k for k in now if k in then and then[k] != now[k] and k not in _MAY_DIFFER]
    if changed:
        changes = ", ".join(f"--{k} {then[k]} -> {now[k]}" for k in changed)
        log.warning("%s %s: flags that were others then: %s", flag, path.name, changes)
    return Progress(state["step"], Place(*state["place"]))


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        state["step"], state["place"], state["args"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path / STATE_FILE} is damaged ({first_line(error)}); delete {path} to go on from "
            "the checkpoint before it"
        ) from None
    return state


def check_reference(path: Path, digest: str, settings: dict[str, dict[str, Any]]) -> None:
    """Refuse to go on against another reference than a checkpoint was trained against. Checkpoints
    from before this was kept are taken.

    Args:
        settings: as `sdpo.models.reference.settings_of` lists them.

    Raises:
        UserError: naming the base and the --unet_init that it had, or the setting that changed.
    """
    state = read_state(path)
    for part, before in (state.get("base") or {}).items():
        # Libraries of another version may know other settings.
        for name in before.keys() & settings.get(part, {}).keys():
            if before[name] != settings[part][name]:
                raise UserError(
                    f"{path} was trained with a {part} whose {name} is {before[name]}, and the "
                    f"base's is {settings[part][name]} now; give it the same, or another "
                    "--output_dir"
                )
    if state.get("reference") and state["reference"] != digest:
        then = state["args"]
        raise UserError(
            f"{path} was trained against another reference: --pretrained_model_name_or_path "
            f"{then.get('pretrained_model_name_or_path')}, --unet_init {then.get('unet_init')}, "
            f"--lora_init {then.get('lora_init')}; "
            "give the same weights, or another --output_dir"
        )


def load_weights(checkpoint: Path, unet: nn.Module) -> None:
    """Load what is trained, in place, to the bit as it was saved.

    Raises:
        UserError: a file of the checkpoint is unreadable or does not fit.
    """
    if has_adapters(unet):
        load_adapters(unet, checkpoint / LORA_FILE)
    else:
        _load_unet(checkpoint / UNET_FILE, unet)


def load_ema(checkpoint: Path, training: dict[str, Any], unet: nn.Module, ema: Ema) -> None:
    """Load the average and its count of steps.

    Raises:
        UserError: a file of the checkpoint is unreadable or does not fit.
    """
    with ema.applied():
        if has_adapters(unet):
            load_adapters(unet, checkpoint / EMA_LORA_FILE)
        else:
            _load_unet(checkpoint / EMA_FILE, unet)
    ema.steps = training["ema"]["steps"]


def _load_unet(path: Path, unet: nn.Module) -> None:
    load_strictly(unet, read_state_dict(path), str(path))


def load_training(path: Path) -> dict[str, Any]:
    """Read the state dicts that `save_checkpoint` was given as `training`.

    Raises:
        UserError: unreadable.
    """
    try:
        return torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path / OPTIMIZER_FILE}: {error}") from None


def export_run(output_dir: Path, models: Models) -> list[Path]:
    """Write what a finished run leaves at the top of `output_dir`; the UNet ends on the CPU.

    Args:
        models: as for `save_checkpoint`.

    Returns: the paths, the pipeline first.
    """
    written = []
    if models.ema is not None:
        with models.ema.applied():
            written += _export(output_dir, models, _EMA)
    return _export(output_dir, models, "") + written


def _export(output_dir: Path, models: Models, suffix: str) -> list[Path]:
    written = []
    unet = plain = models.unet
    if has_adapters(unet) or suffix:
        plain = models.base.family.load_unet(models.base.source)
        plain.load_state_dict(plain_state(models))
    if has_adapters(unet):
        path = output_dir / (EMA_LORA_FILE if suffix else LORA_FILE)
        with written_beside(path) as beside:
            save_adapters(unet, beside)
        written.append(path)
    name = f"pipeline{suffix}"
    return [export_pipeline(output_dir / name, models.base, plain), *written]


def export_pipeline(path: Path, base: Base, unet: nn.Module) -> Path:
    """Write `unet` and the base's other parts as a whole diffusers pipeline, float32 safetensors,
    for anyone's `from_pretrained`.

    The other parts are loaded afresh, since the run may hold them in half precision.
    """
    family, source = base
    pipeline = family.pipeline(unet.to("cpu"), family.load_frozen(source), source)
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside, safe_serialization=True)
    name_for_all_versions(beside)
    replace_directory(beside, path)
    return path

"""Uploading a model and its card to the Hugging Face hub, in one commit: a repository in which
`from_pretrained` or `load_lora_weights` finds them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo.common.errors import UserError, first_line
from sdpo.config import HubConfig
from sdpo.models.locations import hub_id
from sdpo.models.lora import LORA_FILE
from sdpo.training.card import card_text, edited_card
from sdpo.training.card_use import Weights
from sdpo.training.checkpoint import EMA_LORA_FILE
from sdpo.training.checkpoint_paths import latest_checkpoint
from sdpo.training.hub_checks import PROGRAM
from sdpo.training.made import CARD_FILE, Made, read_made

log = logging.getLogger(__name__)

EMA_UNET = "unet_ema"


@dataclass(frozen=True)
class Upload:
    """What goes into a repository: files by their paths in it, and what the card says of them."""

    made: Made
    weights: Weights
    files: dict[str, Path]
    card: bytes | None = None  # one that somebody wrote or edited


def of_run(run: Path) -> Upload:
    """Collect what a finished run left: its adapters where a base on the hub is all that they need,
    else its pipeline.

    Raises:
        UserError: it has not come to its end.
    """
    newest, pipeline = latest_checkpoint(run), run / "pipeline"
    if newest is None or not pipeline.is_dir():
        raise UserError(
            f"--push_to_hub: {run} holds no pipeline/, which a run leaves at its end; give --out "
            "FILE_OR_DIR to export one of its checkpoints"
        )
    made = read_made(newest)
    model = made.config.model
    on_hub = hub_id(model.pretrained_model_name_or_path) and model.unet_init is None
    if on_hub and (run / LORA_FILE).is_file():
        ema = EMA_LORA_FILE if (run / EMA_LORA_FILE).is_file() else ""
        files = {name: run / name for name in (LORA_FILE, ema) if name}
        return Upload(made, Weights("lora", LORA_FILE, ema), files, edited_card(run))
    averages = below(run / "pipeline_ema" / "unet")
    files = below(pipeline) | {f"{EMA_UNET}/{name}": path for name, path in averages.items()}
    weights = Weights("pipeline", "", f"{EMA_UNET}/" if averages else "")
    return Upload(made, weights, files, edited_card(run))


def below(directory: Path) -> dict[str, Path]:
    """List the files below a directory by their paths in it."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths}


def push(upload: Upload, hub: HubConfig) -> str:
    """Upload, in one commit; returns the repository's address. Any error of hub and network."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    name = hub.hub_model_id or upload.made.run.name
    repo = api.create_repo(name, private=hub.hub_private_repo or None, exist_ok=True)
    card = upload.card or card_text(upload.made, [upload.weights], repo.repo_id).encode()
    files: dict[str, Path | bytes] = {**upload.files, CARD_FILE: card}
    if picture := upload.made.picture:
        files[picture.relative_to(upload.made.run).as_posix()] = picture
    operations = [
        CommitOperationAdd(path_in_repo=place, path_or_fileobj=content)
        for place, content in files.items()
    ]
    message = f"Upload of step {upload.made.step}"
    api.create_commit(repo.repo_id, operations, commit_message=message)
    return str(repo)


def push_or_tell(upload: Upload, hub: HubConfig, later: Sequence[str] = ()) -> int:
    """Upload; returns the exit code. Where that fails nothing is lost: the log says what to call
    later.

    Args:
        later: that command's arguments; default: those of the run's export.
    """
    try:
        log.info("uploaded to %s", push(upload, hub))
    # Hub and network errors come in many classes.
    except Exception as error:
        command = list(later) or [str(upload.made.run), *flags(hub)]
        log.error(
            "--push_to_hub: nothing was uploaded (%s); all is saved on disk, upload it by: %s",
            first_line(error),
            f"{PROGRAM} {shlex.join(command)}",
        )
        return 1
    return 0


def flags(hub: HubConfig) -> list[str]:
    """Write the flags of a command that uploads to the same place."""
    name = ["--hub_model_id", hub.hub_model_id] if hub.hub_model_id else []
    return ["--push_to_hub", *name, *["--hub_private_repo"] * hub.hub_private_repo]

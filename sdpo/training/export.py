"""Export a run or one of its checkpoints for other programs.

    python -m sdpo.training.export output/run --out model.safetensors --half
    python -m sdpo.training.export output/run --out lora.safetensors --format lora_kohya

    python -m sdpo.training.export output/run --push_to_hub --hub_model_id ORG/NAME

original: UNet, VAE and text encoders in one file, in the layout of SD's first code; lora_kohya: a
LoRA run's adapters in the naming of kohya's scripts; diffusers: a pipeline directory. With
--push_to_hub what was written is uploaded with a card; without --out, what the run's end left.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import write_bytes, written_beside
from sdpo.common.flags import flag, from_flat, parse
from sdpo.config import HubConfig, TrainConfig
from sdpo.training.checkpoint_paths import (
    EMA_FILE,
    STATE_FILE,
    UNET_FILE,
    is_complete,
    latest_checkpoint,
)
from sdpo.training.hub_checks import PROGRAM, check_account, check_hub
from sdpo.training.runlog import CONFIG_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from sdpo.models import Base
    from sdpo.training.hub import Upload
    from sdpo.training.made import Made


@dataclass(frozen=True)
class ExportConfig:
    """The program's flags."""

    run: Path = flag(None, "--output_dir of a run, or a checkpoint of it", positional=True)
    out: Path | None = flag(
        None,
        "file to write; a directory with --format diffusers; it can be left out with --push_to_hub",
        metavar="PATH",
    )
    format: str = flag(
        "original",
        "original: all weights in one file; lora_kohya: adapters; diffusers: a pipeline",
        choices=("original", "lora_kohya", "diffusers"),
    )
    half: bool = flag(False, "in half precision (fp16)", shown="float32")
    ema: bool = flag(False, "the averages of a run with --use_ema")
    force: bool = flag(False, "write over what is at --out")
    hub: HubConfig = field(default_factory=HubConfig)


def main() -> int:
    """Write what the flags describe, and upload it where they say so; returns the exit code, 1
    where only the upload failed.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse(ExportConfig, sys.argv[1:], PROGRAM, __doc__)
    checkpoint = check_export(config)
    if config.hub.push_to_hub:
        check_account(config.hub)

    from sdpo.common.processes import quieten_libraries
    from sdpo.training.card import write_run_card
    from sdpo.training.hub import of_run, push_or_tell

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quieten_libraries()
    run = checkpoint.resolve().parent
    if config.out is not None:
        _export(config, config.out, checkpoint)
        print(f"wrote {config.out}")
    if config.out is None or (run / CONFIG_FILE).is_file():
        write_run_card(run)
    if not config.hub.push_to_hub:
        return 0
    upload = of_run(run) if config.out is None else of_export(config, config.out, checkpoint)
    again = [*sys.argv[1:], *["--force"] * (config.out is not None and not config.force)]
    return push_or_tell(upload, config.hub, again)


def _export(config: ExportConfig, out: Path, checkpoint: Path) -> None:
    from sdpo.models import open_base
    from sdpo.models.loading import load_strictly, read_state_dict
    from sdpo.training.card import edited_card
    from sdpo.training.checkpoint import export_pipeline
    from sdpo.training.made import read_made

    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    base = open_base(from_flat(TrainConfig, state["args"]))
    weights = checkpoint / (EMA_FILE if config.ema else UNET_FILE)
    unet = base.family.load_unet(base.source)
    if config.format == "lora_kohya":
        write_tensors(out, _adapters(config, checkpoint, unet), config.half)
        return
    load_strictly(unet, read_state_dict(weights), str(weights))
    if config.format == "diffusers":
        card = edited_card(out)
        export_pipeline(out, base, unet)
        _add_card(out, read_made(checkpoint, config.ema), card)
    else:
        write_tensors(out, original_state(base, unet), config.half)


def _add_card(out: Path, made: Made, card: bytes | None) -> None:
    """Put a card into an exported pipeline, with its picture: the one that somebody wrote there, or
    the model's own."""
    from sdpo.training.card import card_text
    from sdpo.training.card_use import Weights
    from sdpo.training.made import CARD_FILE

    if made.picture:
        copy = out / made.picture.relative_to(made.run)
        copy.parent.mkdir()
        shutil.copyfile(made.picture, copy)
    own = card_text(made, [Weights("pipeline", "")]).encode()
    write_bytes(out / CARD_FILE, own if card is None else card)


def of_export(config: ExportConfig, out: Path, checkpoint: Path) -> Upload:
    """Collect what was exported, for a repository of its own."""
    from sdpo.training.card import edited_card
    from sdpo.training.card_use import Weights
    from sdpo.training.hub import Upload, below
    from sdpo.training.made import CARD_FILE, read_made

    made = read_made(checkpoint, config.ema)
    if config.format == "diffusers":
        files = {name: path for name, path in below(out).items() if name != CARD_FILE}
        return Upload(made, Weights("pipeline", ""), files, edited_card(out))
    kind = "lora" if config.format == "lora_kohya" else "single_file"
    return Upload(made, Weights(kind, out.name), {out.name: out})


def check_export(config: ExportConfig) -> Path:
    """Check the flags; returns the checkpoint that they name.

    Raises:
        UserError: there is none, it lacks what is asked for, or --out is there.
    """
    newest = config.run if is_complete(config.run) else latest_checkpoint(config.run)
    if newest is None:
        raise UserError(f"{config.run} is no checkpoint, and no run with a complete one")
    if config.ema and not (newest / EMA_FILE).is_file():
        raise UserError(f"--ema: {newest} holds no {EMA_FILE}; it was not run with --use_ema")
    check_hub(config.hub, newest.parent)
    if config.out is None:
        if not config.hub.push_to_hub:
            raise UserError("the following arguments are required: --out (see --help)")
        if config.half or config.ema or config.format != "original":
            raise UserError("--half, --ema and --format have no meaning without --out")
        return newest
    if config.format == "diffusers":
        if config.half:
            raise UserError("--half has no meaning with --format diffusers, which is float32")
    elif config.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, got {config.out}")
    elif config.out.is_dir():
        raise UserError(f"--out: {config.out} is a directory")
    if config.out.exists() and not config.force:
        raise UserError(f"--out: {config.out} exists; give another place, or --force")
    return newest


def _adapters(config: ExportConfig, checkpoint: Path, unet: Any) -> dict[str, Tensor]:
    from sdpo.models.lora import LORA_FILE
    from sdpo.models.lora_file import kohya_state, read_lora
    from sdpo.training.checkpoint import EMA_LORA_FILE

    path = checkpoint / (EMA_LORA_FILE if config.ema else LORA_FILE)
    if not path.is_file():
        raise UserError(
            f"--format lora_kohya: {checkpoint} holds no {path.name}; it was not run with "
            "--lora_rank"
        )
    layers = read_lora(path, unet, "--format lora_kohya:")
    if any(layer.magnitude is not None for layer in layers.values()):
        raise UserError(
            "--format lora_kohya: the naming has no agreed place for DoRA's lengths; give "
            "--format original, where they are merged"
        )
    return kohya_state(layers, unet.config)


def original_state(base: Base, unet: Any) -> dict[str, Tensor]:
    """Collect a UNet's weights and those of the base's other parts in the original layout.

    Raises:
        UserError: a part of the base is not to be had, or the layout has no place for the UNet.
    """
    from sdpo.models.original import text_states, unet_state, vae_state

    frozen = base.family.load_frozen(base.source)
    try:
        weights = unet_state(unet.state_dict(), unet.config)
    except ValueError as error:
        raise UserError(f"--format original has no place for the UNet's {error}") from None
    return {
        **weights,
        **vae_state(frozen.vae.state_dict(), frozen.vae.config),
        **text_states([encoder.state_dict() for encoder in frozen.text_encoders]),
    }


def write_tensors(out: Path, state: dict[str, Tensor], to_half: bool) -> None:
    """Write a safetensors file whole, beside its place and renamed.

    Raises:
        UserError: a weight is out of half precision's range.
    """
    import torch
    from safetensors.torch import save_file

    written = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if to_half and value.is_floating_point():
            half = value.to(torch.float16)
            if not torch.isfinite(half).all():
                raise UserError(f"--half: {name} is out of half precision's range; leave it out")
            value = half
        written[name] = value.contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(out) as beside:
        save_file(written, beside, {"format": "pt"})


if __name__ == "__main__":
    run_main(main, "sdpo.export")

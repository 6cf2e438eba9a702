"""What `--unet` may name, and where it lies: a file, a directory, a place on the hub, or `base`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.common.errors import UserError, first_line
from sdpo.common.hub import look_for_hub
from sdpo.config.families import FAMILIES, PARTS
from sdpo.models.checks import Config, check_start
from sdpo.models.locations import (
    HUB_ID,
    WEIGHT_SUFFIXES,
    check_family,
    denoiser_configs,
    read_config,
)
from sdpo.training.checkpoint_paths import UNET_FILE, latest_checkpoint

if TYPE_CHECKING:
    from torch import nn

FLAG = "--unet"
BASE = "base"
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):(.+)")


def check_unet(name: str, family: str, base: Config | None = None) -> None:
    """Refuse what can be seen to be wrong without a network and without torch.

    Args:
        base: configuration of the base's UNet, where it is known.

    Raises:
        UserError: there is no such file or directory, nothing of a UNet is in it, or one of the
            other family or that does not fit the base's other parts.
    """
    path = Path(name)
    if name == BASE or _HUB_FILE.fullmatch(name):
        return
    if path.is_dir():
        found = _inside(path)
        config = next((c for c in reversed(denoiser_configs(found)) if c.is_file()), None)
        if config is not None:
            own = read_config(config)
            check_family(own, family, f"{FLAG} {name}")
            check_start(own, base or own, FAMILIES[family], f"{FLAG}: {config}")
    elif not path.is_file() and (path.suffix in WEIGHT_SUFFIXES or not HUB_ID.fullmatch(name)):
        raise UserError(
            f"{FLAG}: there is no file or directory {name}; give unet.pth, .safetensors, a "
            "diffusers or checkpoint directory, ORG/REPO:path/on/the/hub/unet.pth, or base"
        )
    elif path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{FLAG}: {name} is none of {', '.join(sorted(WEIGHT_SUFFIXES))}")


def _inside(path: Path) -> Path:
    """The UNet in a directory: that of a checkpoint, of a run's newest one, or diffusers'."""
    if (path / UNET_FILE).is_file():
        return path / UNET_FILE
    # A run's directory has a config.json too, but that is not a UNet's.
    if any(c.is_file() for c in denoiser_configs(path)) and not (path / "metrics.jsonl").is_file():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise UserError(
            f"{FLAG}: {path} holds no {UNET_FILE}, no unet/config.json or config.json of "
            "diffusers, and no complete checkpoint"
        )
    return newest / UNET_FILE


def locate_unet(name: str, cache_dir: str | None) -> str | None:
    """Find what a value of `--unet` names, for `ModelSource.unet_init`; downloads a hub file.

    Raises:
        UserError: see `check_unet`; or the hub cannot be reached and the file is not cached.
    """
    if name == BASE:
        return None
    if Path(name).is_dir():
        return str(_inside(Path(name)))
    match = _HUB_FILE.fullmatch(name)
    if match is None or Path(name).is_file():
        return name
    from huggingface_hub import hf_hub_download

    repo, file = match.groups()
    try:
        look_for_hub()
        return hf_hub_download(repo, file, cache_dir=cache_dir)
    # Hub and network errors come in many classes; all mean that the file is not there.
    except Exception as error:
        raise UserError(
            f"{FLAG}: cannot get {file} from {repo} on the hub ({first_line(error)}); download it "
            f"elsewhere and give {FLAG} PATH"
        ) from error


def label_of(name: str) -> str:
    """Make a short name of a model, fit for a directory: `output/run/checkpoint-500/unet.pth` is
    "run_checkpoint-500", `unet_ema.pth` beside it the same with "_ema",
    `AIDC-AI/Diffusion-SDPO:sd1.5/dmpo/unet.pth` "sd1.5_dmpo"."""
    match = _HUB_FILE.fullmatch(name)
    parts = [p for p in Path(match[2] if match else name).parts if p not in ("/", ".", "..")]
    averaged = len(parts) > 1 and not {"unet_ema.pth", "pipeline_ema"}.isdisjoint(parts)
    if len(parts) > 1 and Path(parts[-1]).stem in ("unet", "unet_ema", "diffusion_pytorch_model"):
        parts.pop()
    if len(parts) > 1 and parts[-1] in (*PARTS, "pipeline", "pipeline_ema"):
        parts.pop()
    suffix = Path(parts[-1]).suffix
    parts[-1] = parts[-1].removesuffix(suffix if suffix in WEIGHT_SUFFIXES else "")
    wanted = 2 if match or parts[-1].startswith("checkpoint-") else 1
    label = "_".join(parts[-wanted:]) + ("_ema" if averaged else "")
    return re.sub(r"[^\w.-]+", "_", label)


def digest_of(unet: nn.Module) -> str:
    """Compute a sha256 over a UNet's float32 weights and names, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()

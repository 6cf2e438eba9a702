"""What kind of base a run has, told by its configuration files before torch is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sdpo.common.errors import UserError
from sdpo.common.flags import flag_names
from sdpo.config.families import FAMILIES
from sdpo.config.rules import BaseKind, defaults_of_base
from sdpo.models.checks import BASE_FLAG, SCHEDULER_FILE, Config, Reader
from sdpo.models.locations import (
    WEIGHT_SUFFIXES,
    check_base_location,
    check_sdxl,
    find_family,
    reader_of,
)

if TYPE_CHECKING:
    from sdpo.config import ModelConfig, TrainConfig

C = TypeVar("C", bound="TrainConfig")


def place_of_base(name: str, config: str | None, sdxl: bool) -> tuple[str, str | None]:
    """Say where a base's configurations are, and the single file of its weights, if it is one.

    Args:
        name: of the base: a hub id, a directory or a file.
        config: of --single_file_config.
        sdxl: whether --sdxl was given.
    """
    path = Path(name)
    if path.suffix not in WEIGHT_SUFFIXES or not path.is_file():
        return name, None
    family = "sdxl" if sdxl or _holds_sdxl(path) else "sd15"
    return config or FAMILIES[family].base, name


def _holds_sdxl(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            return any(name.endswith("label_emb.0.0.weight") for name in file.keys())  # noqa: SIM118
    except Exception:
        return False  # loading it says why


def weights_alone(weights: str, place: str) -> UserError:
    """Say that a single file's configurations cannot be had from `place`."""
    return UserError(
        f"{BASE_FLAG}: {weights} holds weights alone, and the configurations and tokenizers of "
        f"{place} cannot be had; give --single_file_config DIR_OR_ID of a base of its family in "
        "diffusers layout"
    )


def kind_of_base(model: ModelConfig, cache_dir: str | None) -> BaseKind:
    """Read what kind of base a run's settings name.

    Raises:
        UserError: its configurations are not to be had, it is of no family that is served, or not
            of the one that --sdxl says.
    """
    check_base_location(model)
    name = model.pretrained_model_name_or_path
    place, weights = place_of_base(name, model.single_file_config, model.sdxl)
    read = reader_of(place, model.revision, cache_dir)
    try:
        family, denoiser = find_family(read, f"{BASE_FLAG}: {place}")
    except UserError as error:
        if weights is None or read("model_index.json") is not None:
            raise
        raise weights_alone(weights, place) from error
    check_sdxl(model.sdxl, family, f"{BASE_FLAG} {place}")
    return BaseKind(family, _predicts(family, read), _resolution(family, denoiser, read))


def _predicts(family: str, read: Reader) -> str:
    if FAMILIES[family].flow:
        return "flow"
    return str((read(SCHEDULER_FILE) or {}).get("prediction_type", "epsilon"))


def _resolution(family: str, denoiser: Config, read: Reader) -> int:
    """The sample size in pixels, where the denoiser's configuration has one."""
    size, levels = denoiser.get("sample_size"), (read("vae/config.json") or {})
    channels = levels.get("block_out_channels") or levels.get("encoder_block_out_channels")
    if isinstance(size, int) and isinstance(channels, list):
        return size * 2 ** (len(channels) - 1)
    return FAMILIES[family].resolution


def settle(config: C) -> C:
    """Fill in what a run's settings leave to its base: resolution, layers to adapt, scope. With
    --check_only a base on the hub is not asked.

    Raises:
        UserError: see `kind_of_base`; or a flag does not fit the base.
    """
    if config.run.check_only and not Path(config.model.pretrained_model_name_or_path).exists():
        return config
    base = kind_of_base(config.model, config.data.cache_dir)
    defaults = defaults_of_base(config.flags(), base)
    sections = flag_names(type(config))
    changed = {
        section: replace(
            getattr(config, section),
            **{name: value for name, value in defaults.items() if sections[name] == section},
        )
        for section in {sections[name] for name in defaults}
    }
    return replace(config, **changed)

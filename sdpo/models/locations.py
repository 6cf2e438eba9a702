"""Checks of what names a model, on this machine or on the hub: cheap, before torch is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError, first_line
from sdpo.common.hub import look_for_hub
from sdpo.config import ModelConfig
from sdpo.config.families import FAMILIES, PARTS, family_of_config
from sdpo.models.checks import (
    BASE_FLAG,
    VAE_FLAG,
    Config,
    Reader,
    check_base,
    check_start,
    text_parts,
)

WEIGHT_SUFFIXES = frozenset({".pth", ".pt", ".bin", ".ckpt", ".safetensors"})
# Files that hold a tokenizer's vocabulary.
_SENTENCEPIECE = {"spiece.model"}
_VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, _SENTENCEPIECE)
# The half of an adapter that has its rank first, in any naming.
_LORA_DOWN = re.compile(r"(lora_A(\.default)?|lora_down|lora\.down)\.weight$")
# kohya's and diffusers' names of the text encoders' adapters, with the number of the encoder.
TEXT_LORA = re.compile(r"(?:base_model\.model\.)?(?:lora_te(\d?)_|text_encoder(?:_(\d))?\.)")
# ORG/NAME; a path that begins with a dot is none.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def looks_local(name: str) -> bool:
    """Whether a "hub id or directory" value can only mean a path on this machine."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()


def hub_id(name: str | None) -> str | None:
    """Give a name that means a place on the hub; None for one on this machine."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def check_model_location(config: ModelConfig) -> None:
    """Check that what --pretrained_model_name_or_path and the like name on this machine is there,
    and of one family that is served.

    Raises:
        UserError: otherwise. Hub ids are checked when their configuration arrives.
    """
    base, flag = check_base_location(config)
    family = denoiser = None
    if base.is_dir():
        family, denoiser = find_family(reader(base), f"{flag}: {base}")
        check_sdxl(config.sdxl, family, str(base))
    if config.pretrained_vae_model_name_or_path:
        check_component_dir(config.pretrained_vae_model_name_or_path, VAE_FLAG, "config.json")
    if family is not None:
        _check_local_base(base, family, config)
    if config.unet_init:
        init = Path(config.unet_init)
        is_file_name = init.suffix in WEIGHT_SUFFIXES
        if (is_file_name or looks_local(config.unet_init)) and not init.exists():
            raise UserError(f"--unet_init: there is no file or directory {config.unet_init}")
        found = next((p for p in denoiser_configs(init) if p.is_file()), None)
        if found is not None and family is not None:
            own = read_config(found)
            check_family(own, family, f"--unet_init {config.unet_init}")
            check_start(own, denoiser or own, FAMILIES[family], f"--unet_init: {found}")
    if config.lora_init:
        rank = check_lora_file(config.lora_init, "--lora_init", beside_text=False)
        if rank is not None and rank != config.lora_rank:
            raise UserError(
                f"--lora_init {config.lora_init} has rank {rank}, and --lora_rank is "
                f"{config.lora_rank}: give --lora_rank {rank}"
            )


def check_base_location(config: ModelConfig) -> tuple[Path, str]:
    """Check that what names a base on this machine is there; returns where its configurations are,
    which need be no directory, and the flag that says so.

    Raises:
        UserError: otherwise.
    """
    base, flag = Path(config.pretrained_model_name_or_path), BASE_FLAG
    if base.is_file() and base.suffix in WEIGHT_SUFFIXES:
        if config.single_file_config:
            base, flag = Path(config.single_file_config), "--single_file_config"
            _check_base_dir(config.single_file_config, flag)
    elif config.single_file_config:
        raise UserError(
            "--single_file_config has no meaning unless --pretrained_model_name_or_path is a "
            "single-file checkpoint"
        )
    else:
        _check_base_dir(config.pretrained_model_name_or_path, flag)
    return base, flag


def check_lora_file(name: str, flag: str, beside_text: bool = True) -> int | None:
    """A LoRA must be a file of weights; returns the largest rank in it if it is a safetensors file.

    Args:
        beside_text: it may adapt the text encoders too.

    Raises:
        UserError: naming the flag.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {name}")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{flag}: {name} is none of {', '.join(sorted(WEIGHT_SUFFIXES))}")
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            downs = filter(_LORA_DOWN.search, names)
            ranks = [file.get_slice(name).get_shape()[0] for name in downs]
    except Exception as error:
        raise UserError(f"{flag}: cannot read {name}: {first_line(error)}") from None
    if not beside_text:
        refuse_text_lora(names, f"{flag} {name}")
    return max(ranks, default=None)


def refuse_text_lora(names: Iterable[str], where: str) -> None:
    """Refuse a LoRA's weights if some of them adapt a text encoder.

    Raises:
        UserError: beginning with `where`.
    """
    names = list(names)
    text = [name for name in names if TEXT_LORA.match(name)]
    if text:
        raise UserError(
            f"{where}: {len(text)} of its {len(names)} weights adapt the text encoder (e.g. "
            f"{text[0]}), which is not trained here, so that neither run nor reference would be "
            "what the file was made for; give a file for the UNet alone"
        )


def denoiser_configs(directory: Path) -> list[Path]:
    """Name the places of a denoiser's configuration in a directory, the plain one first."""
    return [directory / "config.json", *(directory / part / "config.json" for part in PARTS)]


def _check_base_dir(name: str, flag: str) -> None:
    part = next((p for p in PARTS if (Path(name) / p / "config.json").is_file()), "unet")
    check_component_dir(name, flag, f"{part}/config.json")


def _check_local_base(base: Path, family: str, config: ModelConfig) -> None:
    index, read = base / "model_index.json", reader(base)
    for part in text_parts(family, read_config(index) if index.is_file() else {}):
        folder = FAMILIES[family].text[part].tokenizer
        names = {path.name for path in (base / folder).glob("*")}
        kinds = [kind for kind in _VOCABULARIES if kind <= names]
        if kinds == [_SENTENCEPIECE] and find_spec("sentencepiece") is None:
            raise UserError(
                f"{BASE_FLAG}: {base}/{folder} has its vocabulary in spiece.model alone, which the "
                "package sentencepiece reads: pip install sentencepiece"
            )
        if not kinds:
            raise UserError(
                f"{BASE_FLAG}: {base}/{folder} has neither tokenizer.json nor vocab.json with "
                "merges.txt, the tokenizer's vocabulary"
            )
    vae, name = None, config.pretrained_vae_model_name_or_path
    # A VAE on the hub is checked when its configuration arrives.
    if name and Path(name).is_dir():
        vae = read_config(Path(name) / "config.json")
    elif name:
        vae = {}
    check_base(read, family, str(base), vae, f"{VAE_FLAG}: {name}/config.json")


def reader(base: Path) -> Reader:
    """Give what reads the JSON files of a local base; None for those that it has not."""
    return lambda file: read_config(base / file) if (base / file).is_file() else None


def reader_of(name: str, revision: str | None, cache_dir: str | None) -> Reader:
    """Give what reads the JSON files of a directory or of a repository on the hub."""
    if Path(name).is_dir():
        return reader(Path(name))

    def read(file: str) -> Config | None:
        try:
            path = _from_hub(name, file, revision, cache_dir)
        # Hub and network errors come in many classes; all mean that the file is not there.
        except Exception:
            return None
        return read_config(path)

    return read


@cache  # the hub is asked again at every call, and several checks read the same files
def _from_hub(name: str, file: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    look_for_hub()
    return Path(hf_hub_download(name, file, revision=revision, cache_dir=cache_dir))


def check_component_dir(name: str, flag: str, needed: str) -> None:
    """A "hub id or directory" value that is a path must be a directory that holds `needed`.

    Raises:
        UserError: naming the flag.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / needed).is_file():
            raise UserError(f"{flag}: {name} has no {needed}, so it is not in diffusers layout")
    elif path.is_file():
        raise UserError(f"{flag}: {name} is a file; give a directory in diffusers layout")
    elif looks_local(name):
        raise UserError(f"{flag}: there is no directory {name}")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as a dict.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object")
    return config


def find_family(read: Reader, where: str) -> tuple[str, Config]:
    """Find a base's family, a name of `FAMILIES`, and its denoiser's configuration.

    Args:
        read: gives the base's files.
        where: names it, for messages.

    Raises:
        UserError: it has no denoiser, or one that no family has.
    """
    for part in PARTS:
        if (config := read(f"{part}/config.json")) is not None:
            return _family(config, f"{where}/{part}/config.json"), config
    raise UserError(
        f"{where}: cannot load {' or '.join(f'{part}/config.json' for part in PARTS)}; give a hub "
        "id this machine can reach or has in --cache_dir, or a local directory in diffusers layout"
    )


def _family(config: Config, where: str) -> str:
    extra = config.get("addition_embed_type")
    if extra not in (None, "text_time"):
        raise UserError(
            f"{where} holds a UNet of another kind: addition_embed_type is {extra!r}; it must be "
            "null (SD1.5) or text_time (SDXL)"
        )
    family = family_of_config(config)
    if family is None:
        known = ", ".join(dict.fromkeys(facts.model for facts in FAMILIES.values()))
        raise UserError(f"{where} is of a {config.get('_class_name')}; served are {known}")
    return family


def check_sdxl(sdxl: bool, family: str, where: str) -> None:
    """Refuse --sdxl for a base of another family.

    Raises:
        UserError: beginning with `where`.
    """
    if sdxl and family != "sdxl":
        facts = FAMILIES[family]
        raise UserError(f"{where} holds an {facts.label} {facts.kind}: leave --sdxl out")


def check_family(config: Config, family: str, where: str) -> None:
    """Refuse a denoiser's configuration that is not of the family asked for.

    Raises:
        UserError: beginning with `where`.
    """
    found, wanted = _family(config, where), FAMILIES[family]
    if found != family:
        has = FAMILIES[found]
        advice = f", or {has.advice}" if has.advice and wanted.advice else ""
        raise UserError(
            f"{where} holds an {has.label} {has.kind}, but the base is of {wanted.label}: give "
            f"one of that{advice}"
        )

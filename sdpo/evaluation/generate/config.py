"""generate.py's flags, and every check on them that needs no torch and no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.common.flags import FINITE, Check, at_least, at_most, flag, multiple_of
from sdpo.config import ModelConfig
from sdpo.config.families import FAMILIES
from sdpo.config.rules import BaseKind, check_resolution
from sdpo.evaluation.generate.run_base import base_of_run
from sdpo.evaluation.generate.suites import BUILT_SUITES, KNOWN_SUITES, read_suite
from sdpo.evaluation.generate.unets import BASE, check_unet, label_of
from sdpo.models.checks import SCHEDULER_FILE
from sdpo.models.kind import kind_of_base
from sdpo.models.locations import check_lora_file, check_model_location, reader

PROTOCOL_NAMES = ("paper", "diffusers")
# A torch generator takes 64 bits; with --protocol diffusers the prompt's number is added.
LARGEST_SEED = Check("be below 2^64 - 2^32", lambda seed: seed < 2**64 - 2**32)
DTYPE_NAMES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class GenerationConfig:
    """Which model makes images of which prompts, and how. `fill_in` sets what is None here."""

    unet: str = flag(
        "",
        "unet.pth, .safetensors, a diffusers UNet or pipeline directory, a checkpoint or run "
        "directory of train.py, ORG/REPO:path/unet.pth on the hub, or `base`",
        metavar="UNET",
        required=True,
    )
    lora: str | None = flag(
        None,
        "LoRA file (diffusers' or kohya's names) to add into UNet and text encoders, at its own "
        "scale",
        metavar="FILE",
    )
    suites: tuple[str, ...] = flag(
        BUILT_SUITES,
        f"prompts: {', '.join(KNOWN_SUITES)}, or a JSON, JSONL, CSV, TSV or TXT file",
        metavar="SUITE",
    )
    sdxl: bool = flag(
        False, "the model is an SDXL model; of a base that is given the family is read"
    )
    pretrained_model_name_or_path: str = flag(
        None,
        "base pipeline, for all but the UNet; as train.py's",
        metavar="ID_OR_PATH",
        shown="that of the run that --unet lies in, else SD1.5's official one, with --sdxl SDXL's",
    )
    single_file_config: str | None = flag(
        None,
        "base whose configurations and tokenizers a single-file checkpoint goes with",
        metavar="ID_OR_DIR",
        shown="the family's official one",
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "VAE; `base`: the base's own",
        metavar="ID_OR_DIR",
        shown="the run's too; else SD1.5's own; for SDXL madebyollin/sdxl-vae-fp16-fix",
    )
    revision: str | None = flag(None, "git revision of the base on the hub")
    cache_dir: str | None = flag(None, "where downloads are kept", metavar="DIR")
    prompt_source: str | None = flag(
        None, "files to build missing suites from, off line", metavar="DIR"
    )
    outdir: Path = flag(
        None,
        "where images and manifests are written",
        metavar="DIR",
        shown="output/eval/<name of the UNet>",
    )
    protocol: str = flag(
        None,
        "paper: as published, one noise for all prompts; diffusers: a plain pipeline with a seed "
        "for every prompt",
        choices=PROTOCOL_NAMES,
        shown="paper for SD1.5 and SDXL that predict noise, else diffusers",
    )
    steps: int = flag(
        None, "sampling steps", check=at_least(1), shown="the family's: 50 for SD1.5 and SDXL"
    )
    cfg: float = flag(
        None,
        "guidance c; paper: cond + c (cond - uncond); diffusers: uncond + c (cond - uncond)",
        check=FINITE,
        shown="7.5; with --protocol diffusers the family's, for SDXL 5.0",
    )
    seed: int = flag(0, "of the noise", check=(at_least(0), LARGEST_SEED))
    resolution: int = flag(
        None,
        "side of the square images, in pixels",
        metavar="PX",
        check=(at_least(1), at_most(16384), multiple_of(8)),
        shown="the base's own: 512 of SD1.5, 1024 of SDXL",
    )
    batch_size: int = flag(8, "images at a time", metavar="N", check=at_least(1))
    dtype: str = flag("bf16", "of UNet and text encoders", choices=DTYPE_NAMES)
    offload_text_encoders: bool = flag(
        False,
        "keep the text encoders in the host's memory, on the device only while prompts are "
        "encoded; with --protocol diffusers every part while it is asked",
    )
    limit: int | None = flag(
        None, "only the first N prompts of each suite", metavar="N", check=at_least(1)
    )

    family: str = "sd15"  # no flag: read from the base


def fill_in(config: GenerationConfig) -> GenerationConfig:
    """Fill in what depends on other flags, and check that models and directories can be there.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config, kind = _with_base(config)
    vae = config.pretrained_vae_model_name_or_path
    family = FAMILIES[kind.family]
    published = kind.family in ("sd15", "sdxl") and kind.predicts == "epsilon"
    protocol = config.protocol or ("paper" if published else "diffusers")
    if protocol == "paper" and not published:
        raise UserError(
            f"--protocol paper is defined for SD1.5 and SDXL that predict noise, and the base is "
            f"of {family.label} ({kind.predicts}): give --protocol diffusers"
        )
    guidance = family.guidance if protocol == "diffusers" else 7.5
    filled = replace(
        config,
        family=kind.family,
        protocol=protocol,
        steps=config.steps or family.steps,
        cfg=guidance if config.cfg is None else config.cfg,
        resolution=config.resolution or kind.resolution,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path or family.base,
        pretrained_vae_model_name_or_path=None if vae == "base" else vae or family.vae,
    )
    check_model_location(_model(filled))
    check_resolution(filled.resolution, family)
    base = Path(filled.pretrained_model_name_or_path)
    read = reader(Path(filled.single_file_config) if filled.single_file_config else base)
    check_unet(config.unet, kind.family, read(f"{family.part}/config.json"))
    check_steps(filled.steps, read(SCHEDULER_FILE) or {})
    # The base of any family is called `base`.
    label = f"{BASE}_{kind.family}" if config.unet == BASE else label_of(config.unet)
    if config.lora:
        check_lora_file(config.lora, "--lora")
        label += f"_{label_of(config.lora)}"
    filled = replace(filled, outdir=config.outdir or Path("output/eval") / label)
    check_directory(filled.outdir, "--outdir")
    return filled


def _with_base(config: GenerationConfig) -> tuple[GenerationConfig, BaseKind]:
    """Take the base of the run that --unet lies in, where none is given, and read its kind."""
    run = {}
    if not config.pretrained_model_name_or_path and config.unet != BASE:
        run = base_of_run(config.unet)
    config = replace(config, **{name: getattr(config, name) or run[name] for name in run})
    try:
        return config, _kind(config)
    except UserError as error:
        if not run:
            raise
        base = config.pretrained_model_name_or_path
        raise UserError(f"--unet: {config.unet} was trained from {base}: {error}") from None


def check_steps(steps: int, schedule: Mapping[str, Any]) -> None:
    """Refuse more sampling steps than there are timesteps.

    Args:
        schedule: configuration of the base's scheduler; {} where it is not known yet.

    Raises:
        UserError: naming the flag.
    """
    timesteps = schedule.get("num_train_timesteps", steps)
    if steps > timesteps:
        raise UserError(
            f"--steps {steps}: the base's schedule has {timesteps} timesteps, give at most so many"
        )


def _model(config: GenerationConfig) -> ModelConfig:
    return ModelConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        pretrained_vae_model_name_or_path=config.pretrained_vae_model_name_or_path,
        single_file_config=config.single_file_config,
        revision=config.revision,
        sdxl=config.sdxl,
    )


def _kind(config: GenerationConfig) -> BaseKind:
    """The kind of the base that is given; else of the official one, without asking the hub."""
    name, family = config.pretrained_model_name_or_path, "sdxl" if config.sdxl else "sd15"
    if not name or (find_spec("huggingface_hub") is None and not Path(name).exists()):
        return BaseKind(family, "epsilon", FAMILIES[family].resolution)
    return kind_of_base(_model(config), config.cache_dir)


def check_suites(config: GenerationConfig) -> None:
    """Read what --suites names on this machine; those that are built are looked for later.

    Raises:
        UserError: a file cannot be read, or two suites have one name.
    """
    names = [name if name in KNOWN_SUITES else read_suite(name).name for name in config.suites]
    if len(set(names)) < len(names):
        raise UserError(f"--suites: two suites have one name: {' '.join(config.suites)}")

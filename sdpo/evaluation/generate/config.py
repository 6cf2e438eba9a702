"""generate.py's flags, and every check on them that needs no torch and no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdpo.common.errors import UserError
from sdpo.common.files import check_directory
from sdpo.common.flags import FINITE, Check, at_least, at_most, flag, multiple_of
from sdpo.config import ModelConfig
from sdpo.config.families import FAMILIES
from sdpo.evaluation.generate.suites import BUILT_SUITES, KNOWN_SUITES, read_suite
from sdpo.evaluation.generate.unets import BASE, check_unet, label_of
from sdpo.models.checks import SCHEDULER_FILE
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
    sdxl: bool = flag(False, "the model is an SDXL model", shown="SD1.5")
    pretrained_model_name_or_path: str = flag(
        None,
        "base pipeline, for all but the UNet; as train.py's",
        metavar="ID_OR_PATH",
        shown="the family's official one",
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
        shown="SD1.5's own; for SDXL madebyollin/sdxl-vae-fp16-fix",
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
        "paper",
        "paper: as published, one noise for all prompts; diffusers: a plain pipeline with a seed "
        "for every prompt",
        choices=PROTOCOL_NAMES,
    )
    steps: int = flag(50, "sampling steps", check=at_least(1))
    cfg: float = flag(
        None,
        "guidance c; paper: cond + c (cond - uncond); diffusers: uncond + c (cond - uncond)",
        check=FINITE,
        shown="7.5; with --protocol diffusers and --sdxl 5.0",
    )
    seed: int = flag(0, "of the noise", check=(at_least(0), LARGEST_SEED))
    resolution: int = flag(
        None,
        "side of the square images, in pixels",
        metavar="PX",
        check=(at_least(1), at_most(16384), multiple_of(8)),
        shown="512, with --sdxl 1024",
    )
    batch_size: int = flag(8, "images at a time", metavar="N", check=at_least(1))
    dtype: str = flag("bf16", "of UNet and text encoders", choices=DTYPE_NAMES)
    limit: int | None = flag(
        None, "only the first N prompts of each suite", metavar="N", check=at_least(1)
    )

    @property
    def family(self) -> str:
        """The name of the model's family."""
        return "sdxl" if self.sdxl else "sd15"


def fill_in(config: GenerationConfig) -> GenerationConfig:
    """Fill in what depends on other flags, and check that models and directories can be there.

    Raises:
        UserError: naming the flag and what would be right.
    """
    family, vae = FAMILIES[config.family], config.pretrained_vae_model_name_or_path
    guidance = 5.0 if config.protocol == "diffusers" and config.sdxl else 7.5
    filled = replace(
        config,
        cfg=guidance if config.cfg is None else config.cfg,
        resolution=config.resolution or family.resolution,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path or family.base,
        pretrained_vae_model_name_or_path=None if vae == "base" else vae or family.vae,
    )
    check_model_location(
        ModelConfig(
            pretrained_model_name_or_path=filled.pretrained_model_name_or_path,
            pretrained_vae_model_name_or_path=filled.pretrained_vae_model_name_or_path,
            single_file_config=filled.single_file_config,
            sdxl=filled.sdxl,
        )
    )
    base = Path(filled.pretrained_model_name_or_path)
    read = reader(Path(filled.single_file_config) if filled.single_file_config else base)
    check_unet(config.unet, config.sdxl, read("unet/config.json"))
    check_steps(config.steps, read(SCHEDULER_FILE) or {})
    # The base of either family is called `base`.
    label = f"{BASE}_{config.family}" if config.unet == BASE else label_of(config.unet)
    if config.lora:
        check_lora_file(config.lora, "--lora")
        label += f"_{label_of(config.lora)}"
    filled = replace(filled, outdir=config.outdir or Path("output/eval") / label)
    check_directory(filled.outdir, "--outdir")
    return filled


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


def check_suites(config: GenerationConfig) -> None:
    """Read what --suites names on this machine; those that are built are looked for later.

    Raises:
        UserError: a file cannot be read, or two suites have one name.
    """
    names = [name if name in KNOWN_SUITES else read_suite(name).name for name in config.suites]
    if len(set(names)) < len(names):
        raise UserError(f"--suites: two suites have one name: {' '.join(config.suites)}")

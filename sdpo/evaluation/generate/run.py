"""Generate a suite's images: `python eval/generate.py --unet unet.pth`, on several devices
`accelerate launch eval/generate.py ...`.

For every suite, DIR/<suite>_seed0_512x512_50s_7.5cfg/ gets one PNG a prompt, and the manifest
DIR/<suite>_seed0_512x512_50s_7.5cfg.json, written when all are there, says which is which. Killed
at any point, the same command makes only what is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.errors import UserError
from sdpo.common.files import differences, file_sha256, write_json
from sdpo.common.flags import parse
from sdpo.evaluation.generate.config import GenerationConfig, check_steps, check_suites, fill_in
from sdpo.evaluation.generate.manifest import Entry, Manifest, write_manifest
from sdpo.evaluation.generate.suites import Suite, digest, read_suite

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from sdpo.evaluation.generate.protocols import Protocol

SETTINGS_FILE = "settings.json"
# In that file, where its relative paths are meant from.
CALLED_FROM = "called_from"
IMAGE_DESCRIPTION = 0x010E  # EXIF


def parse_args(argv: Sequence[str]) -> GenerationConfig:
    """Parse generate.py's command line, check it and fill in what depends on other flags.

    Raises:
        UserError: naming the flag and what would be right.
    """
    return fill_in(parse(GenerationConfig, argv, "generate.py", __doc__))


def main() -> int:
    """Generate every suite's images; returns the exit code."""
    config = parse_args(sys.argv[1:])
    check_suites(config)

    from sdpo.common.processes import start

    accelerator = start()
    manifests = generate(config, read_suites(config, accelerator), accelerator)
    if accelerator.is_main_process:
        for path in manifests:
            print(f"wrote {path}")
    accelerator.end_training()
    return 0


def read_suites(config: GenerationConfig, accelerator: Accelerator) -> list[Suite]:
    """Read the suites of --suites, up to --limit; the published ones that are missing are built.

    Raises:
        UserError: a suite cannot be read or built.
    """
    from sdpo.evaluation.generate.published import ensure

    with accelerator.local_main_process_first():
        ensure(
            config.suites,
            source=config.prompt_source,
            cache_dir=config.cache_dir,
            source_flag="--prompt_source",
        )
    suites = map(read_suite, config.suites)
    return [Suite(suite.name, suite.prompts[: config.limit]) for suite in suites]


def generate(
    config: GenerationConfig,
    suites: list[Suite],
    accelerator: Accelerator,
    begun: Callable[[int], None] | None = None,
) -> list[Path]:
    """Make what is missing of the suites' images; returns the paths of their manifests.

    The main process calls `begun` with a suite's number once its folder is known to be this
    evaluation's, before images are made.
    """
    protocol, model = build_protocol(config, accelerator)
    manifests = []
    for number, suite in enumerate(suites):
        settings = settings_of(config, suite, protocol, model)
        folder = folder_of(config, suite)
        if accelerator.is_main_process:
            claim(folder, settings)
            if begun:
                begun(number)
        accelerator.wait_for_everyone()
        make_missing(config, suite, folder, protocol, accelerator)
        accelerator.wait_for_everyone()
        manifest = manifest_of(folder)
        if accelerator.is_main_process:
            rows = manifest_rows(suite, folder, protocol, settings)
            check_all_there(rows, config.outdir)
            write_manifest(manifest, rows)
        manifests.append(manifest)
    accelerator.wait_for_everyone()
    return manifests


def folder_of(config: GenerationConfig, suite: Suite) -> Path:
    """Name a suite's image folder."""
    side, protocol = config.resolution, config.protocol
    stem = f"{suite.name}_seed{config.seed}_{side}x{side}_{config.steps}s_{config.cfg:g}cfg"
    return config.outdir / (stem if protocol == "paper" else f"{stem}_{protocol}")


def planned(config: GenerationConfig, suite: Suite) -> Manifest:
    """List the images that a suite will have, by the path of its manifest."""
    folder = folder_of(config, suite)
    paths = image_paths(suite, folder, config.resolution)
    entries = [Entry(p.text, path) for p, path in zip(suite.prompts, paths, strict=True)]
    return Manifest(manifest_of(folder), entries)


def manifest_of(folder: Path) -> Path:
    """Name the manifest of an image folder."""
    return folder.with_name(f"{folder.name}.json")


def build_protocol(
    config: GenerationConfig, accelerator: Accelerator
) -> tuple[Protocol, dict[str, Any]]:
    """Load the models to this process's device; returns the protocol, and what tells the model.

    Raises:
        UserError: a model is not to be had, or the device cannot compute in --dtype.
    """
    from sdpo.common.precision import DTYPES, check_precision
    from sdpo.evaluation.generate.protocols import PROTOCOLS, Sampling
    from sdpo.evaluation.generate.unets import FLAG, digest_of, locate_unet
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource
    from sdpo.models.kind import place_of_base

    check_precision("--dtype", config.dtype, accelerator.device)
    family = get_family(config.family)
    base, weights = place_of_base(
        config.pretrained_model_name_or_path, config.single_file_config, config.family == "sdxl"
    )
    with accelerator.local_main_process_first():
        source = ModelSource(
            base=base,
            weights=weights,
            vae=config.pretrained_vae_model_name_or_path,
            revision=config.revision,
            unet_init=locate_unet(config.unet, config.cache_dir),
            cache_dir=config.cache_dir,
            unet_flag=FLAG,
            lora=config.lora,
        )
        family.check(source)
        check_steps(config.steps, family.load_scheduler(source).config)
        unet = family.load_unet(source)
        frozen = family.load_frozen(source)
    model = {"unet": config.unet}
    if config.lora:
        model |= {"lora": config.lora, "lora_sha256": file_sha256(Path(config.lora))}
    if accelerator.is_main_process:
        model["unet_sha256"] = digest_of(unet)
    sampling = Sampling(
        config.steps, config.cfg, config.seed, config.resolution, DTYPES[config.dtype]
    )
    protocol = PROTOCOLS[config.protocol](
        family, unet, frozen, source, sampling, accelerator.device, config.offload_text_encoders
    )
    return protocol, model


def settings_of(
    config: GenerationConfig, suite: Suite, protocol: Protocol, model: dict[str, Any]
) -> dict[str, Any]:
    """List everything that a suite's images depend on, by name, ready for JSON."""
    return {
        "protocol": config.protocol,
        **model,
        "family": config.family,
        "base": config.pretrained_model_name_or_path,
        "revision": config.revision,
        "vae": config.pretrained_vae_model_name_or_path or "the base's own",
        "suite": suite.name,
        "prompts": len(suite.prompts),
        "prompts_sha256": digest([p.text for p in suite.prompts]),
        "negative_prompt": "",
        "steps": config.steps,
        "cfg": config.cfg,
        "seed": config.seed,
        "height": config.resolution,
        "width": config.resolution,
        "dtype": config.dtype,
        **protocol.describe(),
    }


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the image folder and note the settings there, if what is in it was made with the same.

    Raises:
        UserError: it was not; going on would mix two models or two protocols.
    """
    path = folder / SETTINGS_FILE
    changed = differences(path, settings)
    if changed is None and any(folder.glob("*.png")):
        raise UserError(
            f"--outdir: {folder} holds images of unknown settings (it has no {SETTINGS_FILE}); "
            "give another --outdir"
        )
    # The same weights may be named by another path.
    names = sorted((changed or {}).keys() - {"unet", "lora", CALLED_FROM, *_same(changed or {})})
    if changed and names:
        before, now = changed[names[0]]
        raise UserError(
            f"--outdir: {folder} holds images made with another {', '.join(names)} (e.g. "
            f"{names[0]}: {before}, now {now}); give another --outdir, or delete that folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**settings, CALLED_FROM: os.getcwd()})


def _same(changed: dict[str, tuple[Any, Any]]) -> set[str]:
    """Which of the settings that changed name the same place on this machine as before."""
    then = changed.get(CALLED_FROM, ("",))[0]
    return {
        name
        for name in ("base", "vae")
        if name in changed
        and os.path.exists(now := str(changed[name][1]))
        and os.path.realpath(os.path.join(then, str(changed[name][0]))) == os.path.realpath(now)
    }


def make_missing(
    config: GenerationConfig,
    suite: Suite,
    folder: Path,
    protocol: Protocol,
    accelerator: Accelerator,
) -> None:
    """Make this process's share of the images that are not there or are broken."""
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from sdpo.training.samples import save_image

    rank, processes = accelerator.process_index, accelerator.num_processes
    paths = image_paths(suite, folder, config.resolution)
    mine = range(rank, len(paths), processes)
    # Agreed on before any process begins, so that none takes an image for done or undone twice.
    missing = sorted(gather_object([i for i in mine if not is_whole(paths[i])]))
    share = missing[rank::processes]
    with tqdm(
        total=len(missing),
        desc=f"{suite.name} ({len(paths) - len(missing)} there)",
        unit="image",
        disable=not accelerator.is_main_process,
        smoothing=0.1,
    ) as bar:
        for first in range(0, len(share), config.batch_size):
            indices = share[first : first + config.batch_size]
            prompts = [suite.prompts[i].text for i in indices]
            images = protocol(prompts, indices)
            for index, prompt, image in zip(indices, prompts, images, strict=True):
                save_image(image, paths[index], exif=prompt_exif(prompt))
            bar.update(min(len(indices) * processes, len(missing) - bar.n))


def image_paths(suite: Suite, folder: Path, side: int) -> list[Path]:
    """Name the images of a suite, `side` pixels square, as published: <index>_<H>x<W>.png."""
    return [folder / f"{index}_{side}x{side}.png" for index in range(len(suite.prompts))]


def is_whole(path: Path) -> bool:
    """Tell whether an image is there and can be decoded to its end."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    # Decoders raise almost anything on broken files.
    except Exception:
        return False
    return True


def prompt_exif(prompt: str) -> Image.Exif:
    """Make EXIF data with a prompt as its ImageDescription, in UTF-8."""
    from PIL import Image

    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = prompt.encode("utf-8")
    return exif


def manifest_rows(
    suite: Suite, folder: Path, protocol: Protocol, settings: dict[str, Any]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Make the rows of `write_manifest`; each holds all settings and its own index and seed."""
    rows = []
    paths = image_paths(suite, folder, protocol.sampling.resolution)
    for index, (prompt, path) in enumerate(zip(suite.prompts, paths, strict=True)):
        about = {**settings, "index": index, "seed": protocol.seed_of(index)}
        if prompt.category is not None:
            about["category"] = prompt.category
        rows.append((prompt.text, f"{folder.name}/{path.name}", about))
    return rows


def check_all_there(rows: list[tuple[str, str, dict[str, Any]]], outdir: Path) -> None:
    """Refuse a manifest whose images this process cannot all see.

    Raises:
        UserError: some are not there, as on machines that do not share a disk.
    """
    absent = [image for _, image, _ in rows if not (outdir / image).is_file()]
    if absent:
        raise UserError(
            f"--outdir: {len(absent)} images (e.g. {absent[0]}) that other processes made are not "
            f"in {outdir}; all processes need one directory that all of them can read"
        )

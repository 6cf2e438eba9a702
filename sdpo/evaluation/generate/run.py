"""Generate a suite's images: `python eval/generate.py --unet unet.pth`, on several devices
`accelerate launch eval/generate.py ...`.

For every suite, DIR/<suite>_seed0_512x512_50s_7.5cfg/ gets one PNG a prompt, and the manifest
DIR/<suite>_seed0_512x512_50s_7.5cfg.json, written when all are there, says which is which. Killed
at any point, the same command makes only what is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdpo.common.cli import Parser
from sdpo.common.errors import UserError
from sdpo.common.files import differences, write_json
from sdpo.evaluation.generate.config import add_generation_flags, check_generation_flags
from sdpo.evaluation.generate.manifest import write_manifest
from sdpo.evaluation.generate.suites import KNOWN_SUITES, Suite, digest, read_suite

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from sdpo.evaluation.generate.protocols import Protocol

SETTINGS_FILE = "settings.json"
IMAGE_DESCRIPTION = 0x010E  # EXIF


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """generate.py's flags, checked.

    Raises:
        UserError: naming the flag and what would be right.
    """
    parser = Parser("generate.py", __doc__)
    add_generation_flags(parser)
    args = parser.parse_args(argv)
    check_generation_flags(args)
    return args


def main() -> int:
    """Generate every suite."""
    args = parse_args(sys.argv[1:])
    check_suites(args)

    from sdpo.common.processes import start

    accelerator = start()
    generate(args, read_suites(args, accelerator), accelerator)
    accelerator.end_training()
    return 0


def check_suites(args: argparse.Namespace) -> None:
    """Read what --suites names on this machine; those of the published that are missing are built
    later.

    Raises:
        UserError: a file cannot be read, or two suites have one name.
    """
    names = [name if name in KNOWN_SUITES else read_suite(name).name for name in args.suites]
    if len(set(names)) < len(names):
        raise UserError(f"--suites: two suites have one name: {' '.join(args.suites)}")


def read_suites(args: argparse.Namespace, accelerator: Accelerator) -> list[Suite]:
    """The suites of --suites; those of the published that are missing are built first.

    Raises:
        UserError: a suite cannot be read or built.
    """
    from sdpo.evaluation.generate.published import ensure

    with accelerator.local_main_process_first():
        ensure(
            args.suites,
            source=args.prompt_source,
            cache_dir=args.cache_dir,
            source_flag="--prompt_source",
        )
    suites = [read_suite(name) for name in args.suites]
    return [Suite(s.name, s.prompts[: args.limit]) for s in suites] if args.limit else suites


def stem_of(args: argparse.Namespace, suite: Suite) -> str:
    """The name of a suite's image folder and manifest."""
    r, protocol = args.resolution, "" if args.protocol == "paper" else f"_{args.protocol}"
    return f"{suite.name}_seed{args.seed}_{r}x{r}_{args.steps}s_{args.cfg:g}cfg{protocol}"


def generate(args: argparse.Namespace, suites: list[Suite], accelerator: Accelerator) -> list[Path]:
    """Make what is missing of the suites' images; returns their manifests."""
    protocol, model = build_protocol(args, accelerator)
    manifests = []
    for suite in suites:
        settings = settings_of(args, suite, protocol, model)
        folder = args.outdir / stem_of(args, suite)
        if accelerator.is_main_process:
            claim(folder, settings)
        accelerator.wait_for_everyone()
        make_missing(args, suite, folder, protocol, accelerator)
        accelerator.wait_for_everyone()
        manifest = folder.with_name(f"{folder.name}.json")
        if accelerator.is_main_process:
            rows = manifest_rows(args, suite, folder, protocol, settings)
            check_all_there(rows, args.outdir)
            write_manifest(manifest, rows)
        manifests.append(manifest)
    accelerator.wait_for_everyone()
    return manifests


def build_protocol(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[Protocol, dict[str, Any]]:
    """The models on this process's device, and what says which model it is."""
    from sdpo.common.precision import DTYPES, check_precision
    from sdpo.evaluation.generate.protocols import PROTOCOLS, Sampling
    from sdpo.evaluation.generate.unets import FLAG, digest_of, locate_unet
    from sdpo.models import get_family
    from sdpo.models.base import ModelSource

    check_precision("--dtype", args.dtype, accelerator.device)
    family = get_family(args.sdxl)
    with accelerator.local_main_process_first():
        source = ModelSource(
            base=args.pretrained_model_name_or_path,
            vae=args.pretrained_vae_model_name_or_path,
            revision=args.revision,
            unet_init=locate_unet(args.unet, args.cache_dir),
            cache_dir=args.cache_dir,
            unet_flag=FLAG,
        )
        unet = family.load_unet(source)
        frozen = family.load_frozen(source)
    model = {"unet": args.unet}
    if accelerator.is_main_process:
        model["unet_sha256"] = digest_of(unet)
    sampling = Sampling(args.steps, args.cfg, args.seed, args.resolution, DTYPES[args.dtype])
    protocol = PROTOCOLS[args.protocol](family, unet, frozen, source, sampling, accelerator.device)
    return protocol, model


def settings_of(
    args: argparse.Namespace, suite: Suite, protocol: Protocol, model: dict[str, Any]
) -> dict[str, Any]:
    """Everything that an image depends on."""
    return {
        "protocol": args.protocol,
        **model,
        "family": protocol.family.name,
        "base": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "vae": args.pretrained_vae_model_name_or_path or "the base's own",
        "suite": suite.name,
        "prompts": len(suite.prompts),
        "prompts_sha256": digest([p.text for p in suite.prompts]),
        "negative_prompt": "",
        "steps": args.steps,
        "cfg": args.cfg,
        "seed": args.seed,
        "height": args.resolution,
        "width": args.resolution,
        "dtype": args.dtype,
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
    names = sorted((changed or {}).keys() - {"unet"})
    if changed and names:
        before, now = changed[names[0]]
        raise UserError(
            f"--outdir: {folder} holds images made with another {', '.join(names)} (e.g. "
            f"{names[0]}: {before}, now {now}); give another --outdir, or delete that folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def image_name(index: int, resolution: int) -> str:
    """As published: <index>_<H>x<W>.png."""
    return f"{index}_{resolution}x{resolution}.png"


def make_missing(
    args: argparse.Namespace,
    suite: Suite,
    folder: Path,
    protocol: Protocol,
    accelerator: Accelerator,
) -> None:
    """This process's share of the images that are not there or are broken."""
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from sdpo.training.samples import save_image

    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = range(rank, len(suite.prompts), processes)
    broken = [i for i in mine if not is_whole(folder / image_name(i, args.resolution))]
    # Agreed on before any process begins, so that none takes an image for done or undone twice.
    missing = sorted(gather_object(broken))
    share = missing[rank::processes]
    with tqdm(
        total=len(missing),
        desc=f"{suite.name} ({len(suite.prompts) - len(missing)} there)",
        unit="image",
        disable=not accelerator.is_main_process,
        smoothing=0.1,
    ) as bar:
        for first in range(0, len(share), args.batch_size):
            indices = share[first : first + args.batch_size]
            prompts = [suite.prompts[i].text for i in indices]
            for index, prompt, image in zip(
                indices, prompts, protocol(prompts, indices), strict=True
            ):
                path = folder / image_name(index, args.resolution)
                save_image(image, path, exif=prompt_exif(prompt))
            bar.update(min(len(indices) * processes, len(missing) - bar.n))


def is_whole(path: Path) -> bool:
    """Whether an image is there and can be decoded to its end."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    # Decoders raise almost anything on broken files.
    except Exception:
        return False
    return True


def prompt_exif(prompt: str) -> Image.Exif:
    """EXIF with a prompt as its ImageDescription, in UTF-8."""
    from PIL import Image

    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = prompt.encode("utf-8")
    return exif


def manifest_rows(
    args: argparse.Namespace,
    suite: Suite,
    folder: Path,
    protocol: Protocol,
    settings: dict[str, Any],
) -> list[tuple[str, str, dict[str, Any]]]:
    """Rows for `write_manifest`; every one holds all settings and its own index and seed."""
    rows = []
    for index, prompt in enumerate(suite.prompts):
        own = {"index": index, "seed": protocol.seed_of(index)}
        if prompt.category is not None:
            own["category"] = prompt.category
        image = f"{folder.name}/{image_name(index, args.resolution)}"
        rows.append((prompt.text, image, {**settings, **own}))
    return rows


def check_all_there(rows: list[tuple[str, str, dict[str, Any]]], outdir: Path) -> None:
    """Every image must be where this process can see it.

    Raises:
        UserError: it is not, as on machines that do not share a disk.
    """
    absent = [image for _, image, _ in rows if not (outdir / image).is_file()]
    if absent:
        raise UserError(
            f"--outdir: {len(absent)} images (e.g. {absent[0]}) that other processes made are not "
            f"in {outdir}; all processes need one directory that all of them can read"
        )

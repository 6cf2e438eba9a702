"""Build the published prompt suites from their public sources, and prove that they are the same:

    python prompts/build.py [papv2 hpsv2 partiprompts] [--source DIR]

Each suite becomes prompts/NAME.json, a list of {"prompt", "category"}, only if number and sha256 of
its prompts are the published ones. tinyworld.json is no business of this program: it is in the
repository.

papv2 is the Pick-a-Pic v2 test split without duplicates, but the split alone determines neither
which of its captions were taken nor their order. Both are pinned in papv2.order, a digest a line in
place of the prompts themselves, and the split only has to contain them. Images are never read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpo.common.errors import UserError, first_line
from sdpo.common.files import PROMPTS_DIR, write_json
from sdpo.common.flags import flag, parse
from sdpo.evaluation.generate.published_sources import NEEDED, on_disk, on_the_network
from sdpo.evaluation.generate.suites import BUILT_SUITES, Prompt, digest, read_suite_file

LOCK_FILE = ".build.lock"


@dataclass(frozen=True)
class Published:
    """Tells a published suite: the number of its prompts, `digest` of them in order, and of the
    different ones sorted."""

    count: int
    sha256: str
    set_sha256: str


PUBLISHED = {
    "papv2": Published(
        487,
        "b2fad8d9a1c532cff01e6883953075d09407a9d4db553c4e3c4b8d368d4fadf3",
        "bd80fbc615d58943237176db9433502ef2e8cd39bbd3c0fa03454cdcfdd8e41e",
    ),
    "hpsv2": Published(
        3200,
        "6bacc5f43dab0d8357e22486d2f35173bcb75787b4474dfa5ce56bc02543340a",
        "86667219154a15e48e457c81908e906103aafb6b43671314927ab54c3a62ea75",
    ),
    "partiprompts": Published(
        1632,
        "75f9a6570ffb3ccbaefbe32c91606a87ca62ea60d5818232d83caff9bba63d80",
        "b83cb38bfc5148c9ff2e2bda6cd1fda93c09e59aeb6ab47659978c410e8ad2c7",
    ),
}


@dataclass(frozen=True)
class BuildConfig:
    """build.py's flags."""

    suites: tuple[str, ...] = flag(BUILT_SUITES, "which to build", metavar="SUITE", positional=True)
    source: str | None = flag(
        None, "take files that lie anywhere in DIR, use no network", metavar="DIR"
    )
    outdir: Path = flag(PROMPTS_DIR, "where they are written", metavar="DIR", shown="prompts/")
    cache_dir: str | None = flag(None, "where downloads from the hub are kept", metavar="DIR")
    force: bool = flag(False, "build again what is there, and overwrite it")


def parse_args(argv: Sequence[str]) -> BuildConfig:
    """Parse build.py's command line.

    Raises:
        UserError: a name that is none of the suites built here.
    """
    config = parse(BuildConfig, argv, "build.py", __doc__)
    for name in config.suites:
        if name not in PUBLISHED:
            raise UserError(f"{name} is not built here; name any of {', '.join(BUILT_SUITES)}")
    return config


def main() -> int:
    """Build the suites named on the command line; returns the exit code."""
    config = parse_args(sys.argv[1:])
    ensure(config.suites, config.source, config.outdir, config.cache_dir, config.force)
    for name in config.suites:
        print(f"{config.outdir / name}.json: {PUBLISHED[name].count} prompts, as published")
    return 0


def ensure(
    names: Iterable[str],
    source: str | Path | None = None,
    outdir: Path = PROMPTS_DIR,
    cache_dir: str | None = None,
    force: bool = False,
    source_flag: str = "--source",
) -> None:
    """Build the published suites among `names` that are not there.

    Several processes may call it at once: one builds, the others wait and find it done.

    Args:
        names: other names than those of published suites are passed over.
        source: take files from this directory, use no network.
        force: build all of them again.
        source_flag: what the calling program calls `source`.

    Raises:
        UserError: no source can be read, or what it gives is not the published suite, or a file of
            that name is there already and is not. Nothing is written for that suite.
    """
    if source is not None and not Path(source).is_dir():
        raise UserError(f"{source_flag}: there is no directory {source}")
    wanted = [name for name in dict.fromkeys(names) if name in PUBLISHED]
    if not force:
        wanted = [name for name in wanted if not is_built(name, outdir)]
    if not wanted:
        return
    from filelock import FileLock

    try:
        outdir.mkdir(parents=True, exist_ok=True)
        with FileLock(outdir / LOCK_FILE):
            for name in wanted:
                if force or not is_built(name, outdir):
                    prompts = build(name, source, cache_dir, source_flag)
                    write_suite(outdir / f"{name}.json", prompts)
    except OSError as error:
        raise UserError(f"cannot write prompts to {outdir}: {error.strerror or error}") from None


def is_built(name: str, outdir: Path = PROMPTS_DIR) -> bool:
    """Tell whether a suite's file is there, verified by its prompts' sha256.

    Raises:
        UserError: it is there and is not the published suite.
    """
    path = outdir / f"{name}.json"
    if not path.exists():
        return False
    try:
        problem = difference(name, read_suite_file(path).prompts)
    except UserError as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"{path} is not the published suite {name} ({problem}); it is left as it is: move it "
            f"away, or replace it by `python prompts/build.py {name} --force`"
        )
    return True


def build(
    name: str,
    source: str | Path | None = None,
    cache_dir: str | None = None,
    source_flag: str = "--source",
) -> list[Prompt]:
    """Read a suite from the first place that has it, and prove it to be the published one.

    Raises:
        UserError: none has; says what is wrong with each, and what to give instead.
    """
    places = on_disk(name, Path(source)) if source else on_the_network(name, cache_dir)
    if not places:
        raise UserError(
            f"{source_flag}: nothing in {source} to build {name} from; it takes {NEEDED[name]}, "
            f"or a list {name}.json of its prompts"
        )
    unreachable, wrong = [], []
    for place in places:
        print(f"{name}: reading {place.where}", file=sys.stderr, flush=True)
        try:
            prompts = place.read()
            problem = difference(name, prompts)
        except UserError as error:
            problem = str(error)
        # Hub, network and file errors come in many classes; all mean that it cannot be read.
        except Exception as error:
            unreachable.append(f"{place.where} ({first_line(error)})")
            continue
        if not problem:
            return prompts
        wrong.append(f"{place.where}: {problem}")
    if wrong:
        raise UserError(f"{name} is not written, it would not be as published: {'; '.join(wrong)}")
    raise UserError(
        f"{name}: cannot read {', nor '.join(unreachable)}; download {NEEDED[name]} elsewhere and "
        f"give {source_flag} DIR"
    )


def difference(name: str, prompts: list[Prompt]) -> str | None:
    """Say in words how prompts differ from those published; None where they do not."""
    published, texts = PUBLISHED[name], [prompt.text for prompt in prompts]
    found = digest(texts)
    if (len(texts), found) == (published.count, published.sha256):
        return None
    same_set = digest(sorted(set(texts))) == published.set_sha256
    how = "the same in another order or number" if same_set else "different"
    return (
        f"{len(texts)} prompts of sha256 {found[:12]}..., published are {published.count} of "
        f"{published.sha256[:12]}...; compared as sets they are {how}"
    )


def write_suite(path: Path, prompts: list[Prompt]) -> None:
    """Write a suite as `read_suite` reads it, whole; `category` where a prompt has one."""
    rows = [{"prompt": prompt.text, "category": prompt.category} for prompt in prompts]
    write_json(path, [{k: v for k, v in row.items() if v is not None} for row in rows])

"""A sweep's YAML file: what it may hold, and the runs that come of it, checked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, first_line
from sdpo.common.flags import flag_names
from sdpo.config import TrainConfig, parse_train
from sdpo.data.local import check_data_location
from sdpo.evaluation import evaluate, heldout
from sdpo.evaluation.generate.config import check_suites
from sdpo.evaluation.score.relabel import check_choice_model
from sdpo.training.places import check_places

T = TypeVar("T")

KEYS = ("name", "flags", "variants", "grid", "seeds", "heldout", "images")
CHECKPOINTS = ("last", "all")
# What a sweep sets itself.
_OWN_TRAIN = ("output_dir", "seed", "resume_from_checkpoint", "check_only", "cache_reference")
_OWN_HELDOUT = ("run", "ema")
_OWN_IMAGES = ("unet", "outdir", "check_only")
# Which model the images are of; taken from the runs.
_VAE = "pretrained_vae_model_name_or_path"
_MODEL = (
    *("sdxl", "pretrained_model_name_or_path", _VAE, "revision"),
    *("unet_init", "cache_dir", "resolution"),
)


@dataclass(frozen=True)
class PlannedRun:
    """One run. `flags` are those of train.py that the file gives it, and `config` is what comes of
    them; `varied` holds the values of those that differ from run to run."""

    name: str
    variant: str
    seed: int
    flags: dict[str, Any]
    varied: dict[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """A file's content. `heldout` and `images` are flags of sdpo.evaluation.heldout and
    eval/evaluate.py, None where nothing of the kind was asked for; `image_config` is what comes of
    the latter; images are made of the `checkpoints`: last, all."""

    name: str
    runs: list[PlannedRun]
    grid: tuple[str, ...]
    has_variants: bool
    heldout: dict[str, Any] | None
    images: dict[str, Any] | None
    image_config: evaluate.EvaluateConfig | None
    checkpoints: str

    @property
    def scorers(self) -> list[str]:
        """The scorers of the images, none where there are none."""
        return self.image_config.scoring.names if self.image_config else []

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns by which runs that differ in their seed alone go together."""
        return (("variant",) if self.has_variants or not self.grid else ()) + self.grid


def read_sweep(path: Path) -> Sweep:
    """Read and check a file and every run's flags.

    Raises:
        UserError: naming the file, the key or run, and what would be right.
    """
    content = _read(path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: there is no key {key}; the keys are {', '.join(KEYS)}")
    flags = _train_flags(path, "flags", content.get("flags"))
    variants = {
        str(name): _train_flags(path, f"variants, {name}", own)
        for name, own in _mapping(path, "variants", content.get("variants")).items()
    }
    grid = _train_flags(path, "grid", content.get("grid"))
    for flag, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid, {flag}: must be a list of values, e.g. [1, 2]")
        for name, own in variants.items():
            if flag in own:
                raise UserError(f"{path}: {flag} is set by the grid and by the variant {name}")
    name = str(content.get("name", path.stem))
    if not _readable(name):
        raise UserError(f"{path}: name: must hold a letter or a digit, got {name!r}")
    runs = _runs(path, flags, variants or {name: {}}, grid, _seeds(path, content.get("seeds")))
    heldout_flags = images = image_config = None
    if "heldout" in content:
        heldout_flags = _heldout(path, content["heldout"], runs)
    checkpoints = "last"
    if "images" in content:
        images, image_config, checkpoints = _images(path, content["images"], runs)
    return Sweep(
        name, runs, tuple(grid), bool(variants), heldout_flags, images, image_config, checkpoints
    )


class _Loader(yaml.SafeLoader):
    """Of two equal keys YAML would keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"the mapping that begins in line {line} has {key} twice")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping with the keys {', '.join(KEYS)}")
    return content


def _mapping(path: Path, where: str, value: Any) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where}: must be a mapping of names to values, got {value!r}")
    for name in value:
        # YAML takes an unquoted no, off, yes or on for a truth value.
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            raise UserError(f"{path}: {where}: a name must be text, got {name!r}; put it in quotes")
    return value


def _flags(
    path: Path, where: str, value: Any, program: str, known: Container[str], own: Container[str]
) -> dict[str, Any]:
    """A mapping whose keys are flags of a program, without their dashes."""
    flags = _mapping(path, where, value)
    for name in flags:
        if name in own:
            raise UserError(f"{path}: {where}: the sweep sets {name} itself; leave it out")
        if name not in known:
            raise UserError(f"{path}: {where}: {program} has no flag --{name}")
    return flags


def _train_flags(path: Path, where: str, value: Any) -> dict[str, Any]:
    return _flags(path, where, value, "train.py", flag_names(TrainConfig), _OWN_TRAIN)


def _seeds(path: Path, seeds: Any) -> list[int]:
    if seeds is None:
        return [0]
    good = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: must be different numbers of at least 0, e.g. [0, 1, 2]")
    return seeds


def _runs(
    path: Path,
    flags: dict[str, Any],
    variants: dict[str, dict[str, Any]],
    grid: dict[str, list[Any]],
    seeds: list[int],
) -> list[PlannedRun]:
    varying = dict.fromkeys([*itertools.chain(*variants.values()), *grid])
    runs: dict[str, PlannedRun] = {}
    for (variant, own), point in itertools.product(
        variants.items(), itertools.product(*grid.values())
    ):
        chosen = dict(zip(grid, point, strict=True))
        for seed in seeds:
            parts = [variant, *(f"{k}-{v}" for k, v in chosen.items()), f"seed-{seed}"]
            name = "_".join(map(_readable, parts))
            if name in runs:
                raise UserError(f"{path}: two runs would have the name {name}: name variants apart")
            merged = {**flags, **own, **chosen, "seed": seed}
            config = _checked(path, f"run {name}", _parse_run, as_argv(merged))
            values = config.flags()
            varied = {key: values[key] for key in varying}
            runs[name] = PlannedRun(name, variant, seed, merged, varied, config)
    return list(runs.values())


def _readable(text: str) -> str:
    """Fit for a directory's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


def _checked(path: Path, where: str, parse: Callable[[list[str]], T], argv: list[str]) -> T:
    try:
        return parse(argv)
    except UserError as error:
        raise UserError(f"{path}: {where}: {error}") from None


def _parse_run(argv: list[str]) -> TrainConfig:
    """As train.py checks its command line."""
    config = parse_train(argv)
    check_choice_model(config.data)
    return check_places(config)


def _heldout(path: Path, value: Any, runs: list[PlannedRun]) -> dict[str, Any]:
    known, program = flag_names(heldout.HeldoutConfig), f"python -m {heldout.__name__}"
    flags = _flags(path, "heldout", value, program, known, _OWN_HELDOUT)

    def parse(argv: list[str]) -> None:
        config = heldout.parse_config(argv)
        for run in runs:
            data = replace(run.config.data, split=config.split)
            name, directory = config.dataset_name, config.train_data_dir
            if name or directory:
                data = replace(data, dataset_name=name, train_data_dir=directory)
            check_data_location(data)

    _checked(path, "heldout", parse, [".", *as_argv(flags)])
    return flags


def _images(
    path: Path, value: Any, runs: list[PlannedRun]
) -> tuple[dict[str, Any], evaluate.EvaluateConfig, str]:
    value = dict(_mapping(path, "images", value))
    checkpoints = value.pop("checkpoints", "last")
    if checkpoints not in CHECKPOINTS:
        raise UserError(f"{path}: images, checkpoints: must be last or all, got {checkpoints!r}")
    known = flag_names(evaluate.EvaluateConfig)
    flags = _flags(path, "images", value, "evaluate.py", known, _OWN_IMAGES)
    first, *others = [run.config.flags() for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        for name in _MODEL:
            if first[name] != other[name]:
                raise UserError(
                    f"{path}: images: all runs must start from one model, but {runs[0].name} and "
                    f"{run.name} differ in {name}"
                )
    # What is not said is as in training, where evaluate.py has defaults of its own.
    model = {name: first[name] for name in _MODEL if name != "unet_init"}
    flags = {**model, _VAE: first[_VAE] or "base", **flags, "unet": first["unet_init"] or "base"}
    config = _checked(path, "images", evaluate.parse_args, as_argv(flags))
    check_suites(config.generation)
    return flags, config, checkpoints

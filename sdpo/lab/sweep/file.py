"""A sweep's YAML file: what it may hold, and the runs that come of it, checked."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdpo import args as train_args
from sdpo.common.cli import as_argv
from sdpo.common.errors import UserError, first_line
from sdpo.common.flags import build_parser
from sdpo.evaluation import evaluate, heldout
from sdpo.evaluation.generate.config import check_suites
from sdpo.models.locations import check_data_location

KEYS = ("name", "flags", "variants", "grid", "seeds", "heldout", "images")
CHECKPOINTS = ("last", "all")
# What a sweep sets itself.
_OWN_TRAIN = ("output_dir", "seed", "resume_from_checkpoint")
_OWN_HELDOUT = ("run", "ema")
_OWN_IMAGES = ("unet", "outdir", "check_only")
# Which model the images are of; taken from the runs.
_MODEL = ("sdxl", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision")
_MODEL += ("unet_init", "cache_dir", "resolution")


@dataclass(frozen=True)
class PlannedRun:
    """One run. `flags` are train.py's, but for --output_dir, and `args` all of train.py's flags
    parsed; `varied` holds the values of those that differ from run to run."""

    name: str
    variant: str
    seed: int
    flags: dict[str, Any]
    varied: dict[str, Any]
    args: argparse.Namespace


@dataclass(frozen=True)
class Sweep:
    """A file's content. `heldout` and `images` are flags of sdpo.evaluation.heldout and
    eval/evaluate.py, None where nothing of the kind was asked for; `image_args` are the latter
    parsed; `checkpoints`, of which images are made: last, all."""

    name: str
    runs: list[PlannedRun]
    grid: tuple[str, ...]
    has_variants: bool
    heldout: dict[str, Any] | None
    images: dict[str, Any] | None
    image_args: evaluate.EvaluateConfig | None
    checkpoints: str

    @property
    def scorers(self) -> list[str]:
        """Those that score the images."""
        return self.image_args.scoring.names

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
    parser = train_args.build_parser()
    flags = _flags(path, "flags", content.get("flags"), parser, _OWN_TRAIN)
    variants = {}
    for name, own in _mapping(path, "variants", content.get("variants")).items():
        variants[str(name)] = _flags(path, f"variants, {name}", own, parser, _OWN_TRAIN)
    grid = _flags(path, "grid", content.get("grid"), parser, _OWN_TRAIN)
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
    heldout_flags = images = image_args = None
    if "heldout" in content:
        heldout_flags = _heldout(path, content["heldout"], runs)
    checkpoints = "last"
    if "images" in content:
        images, image_args, checkpoints = _images(path, content["images"], runs)
    return Sweep(
        name, runs, tuple(grid), bool(variants), heldout_flags, images, image_args, checkpoints
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
    path: Path,
    where: str,
    value: Any,
    parser: argparse.ArgumentParser,
    own: tuple[str, ...],
) -> dict[str, Any]:
    """A mapping whose keys are flags of a program, without their dashes."""
    flags = _mapping(path, where, value)
    known = {a.dest for a in parser._actions if f"--{a.dest}" in a.option_strings} - {"help"}
    for name in flags:
        if name in own:
            raise UserError(f"{path}: {where}: the sweep sets {name} itself; leave it out")
        if name not in known:
            raise UserError(f"{path}: {where}: {parser.prog} has no flag --{name}")
    return flags


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
            args = _checked(path, f"run {name}", merged, train_args.parse_args)
            varied = {key: getattr(args, key) for key in varying}
            runs[name] = PlannedRun(name, variant, seed, merged, varied, args)
    return list(runs.values())


def _readable(text: str) -> str:
    """Fit for a directory's name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


def _checked(
    path: Path,
    where: str,
    flags: dict[str, Any],
    parse: Callable[[list[str]], Any],
    first: tuple[str, ...] = (),
) -> Any:
    try:
        return parse([*first, *as_argv(flags)])
    except UserError as error:
        raise UserError(f"{path}: {where}: {error}") from None


def _heldout(path: Path, value: Any, runs: list[PlannedRun]) -> dict[str, Any]:
    flags = _flags(path, "heldout", value, heldout.build_parser(), _OWN_HELDOUT)
    args = _checked(path, "heldout", flags, heldout.parse_flags, (".",))
    for run in runs:
        data = argparse.Namespace(**vars(run.args))
        if args.dataset_name or args.train_data_dir:
            data.dataset_name, data.train_data_dir = args.dataset_name, args.train_data_dir
        data.split = args.split
        try:
            check_data_location(data)
        except UserError as error:
            raise UserError(f"{path}: heldout: {error}") from None
    return flags


def _images(
    path: Path, value: Any, runs: list[PlannedRun]
) -> tuple[dict[str, Any], evaluate.EvaluateConfig, str]:
    value = dict(_mapping(path, "images", value))
    checkpoints = value.pop("checkpoints", "last")
    if checkpoints not in CHECKPOINTS:
        raise UserError(f"{path}: images, checkpoints: must be last or all, got {checkpoints!r}")
    flags = _flags(
        path, "images", value, build_parser(evaluate.EvaluateConfig, "evaluate.py"), _OWN_IMAGES
    )
    first = runs[0].args
    for run in runs[1:]:
        for name in _MODEL:
            if getattr(first, name) != getattr(run.args, name):
                raise UserError(
                    f"{path}: images: all runs must start from one model, but {runs[0].name} and "
                    f"{run.name} differ in {name}"
                )
    # What is not said is as in training, where evaluate.py has defaults of its own.
    model = {name: getattr(first, name) for name in _MODEL if name != "unet_init"}
    vae = "pretrained_vae_model_name_or_path"
    flags = {**model, vae: model[vae] or "base", **flags, "unet": first.unet_init or "base"}
    args = _checked(path, "images", flags, evaluate.parse_args)
    check_suites(args.generation)
    return flags, args, checkpoints

"""The command `sdpo`: each of the project's programs by name, from any folder.

    sdpo train --recipe sd15_dspo [--config 8gpu] [flags of train.py]
    sdpo evaluate --unet unet.pth

Training, evaluation, labelling and encoding start one process per CUDA device by accelerate's
launcher, as the scripts of the checkout do; SDPO_LAUNCH_ARGS holds further arguments for it.
"""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from sdpo.common.errors import UserError, run_main
from sdpo.common.files import IN_CHECKOUT, PACKAGE, ROOT
from sdpo.launch import further_arguments, launch

RECIPES_DIR = ROOT / "scripts" / "recipes" if IN_CHECKOUT else PACKAGE / "recipes"
LAUNCH_DIR = ROOT / "scripts" / "configs" if IN_CHECKOUT else PACKAGE / "launch"
TRAIN = ROOT / "train.py" if IN_CHECKOUT else PACKAGE / "train.py"
HERE = "--here"  # before a program's name: in this process, not once per device


class Program(NamedTuple):
    """What a program is for, the module of its `main`, and whether each device gets a process."""

    about: str
    module: str
    launched: bool = False


PROGRAMS = {
    "train": Program("train a model on preference pairs", "", True),
    "heldout": Program("measure a run's checkpoints on held-out pairs", "sdpo.evaluation.heldout"),
    "export": Program("write a run's model for other programs", "sdpo.training.export"),
    "plot": Program("draw the curves of runs", "sdpo.lab.plot"),
    "evaluate": Program("generate every suite and score it", "sdpo.evaluation.evaluate", True),
    "generate": Program("generate a suite's images", "sdpo.evaluation.generate.run"),
    "score": Program("score generated images", "sdpo.evaluation.score.run"),
    "compare": Program("compare models by win rates", "sdpo.evaluation.compare.run"),
    "prompts": Program("build the published suites", "sdpo.evaluation.generate.published"),
    "relabel": Program("label pairs by a scorer", "sdpo.evaluation.score.relabel", True),
    "cache": Program("encode images and captions ahead", "sdpo.data.latents.__main__", True),
    "audit": Program("measure what an update would do to the winners", "sdpo.lab.audit.run"),
    "sweep": Program("train over settings and seeds of a YAML file", "sdpo.lab.sweep.run"),
    "lab": Program("ask all of the lab's questions on the tiny world", "sdpo.lab.tiny.run"),
    "quickstart": Program("train without and with the safeguard", "sdpo.lab.quickstart.run"),
}


def main() -> int:
    """Run the program named first on the command line; returns its exit code.

    Raises:
        UserError: there is none of that name, or it refuses its flags.
    """
    here = sys.argv[1:2] == [HERE]
    name, *argv = sys.argv[1 + here :] or [""]
    if name in ("-h", "--help", "--version"):
        print(help_text() if name != "--version" else import_module("sdpo").__version__)
        return 0
    if name not in PROGRAMS:
        raise UserError(f"{name or 'no command'}: give one of {', '.join(PROGRAMS)}")
    if here or not PROGRAMS[name].launched:
        return run(name, argv)
    return run_on_devices(name, argv)


def help_text() -> str:
    """The help of the command itself: its programs, a line each."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {program.about}" for name, program in PROGRAMS.items()]
    launched = "|".join(name for name, program in PROGRAMS.items() if program.launched)
    return "\n".join(
        [
            "usage: sdpo PROGRAM ...   (sdpo PROGRAM --help lists its flags)\n",
            *lines,
            f"\nsdpo train --recipe NAME takes published settings: {', '.join(names(RECIPES_DIR))}",
            f"\nsdpo {launched} starts one process per CUDA device, or as",
            f"--config NAME|FILE of accelerate says: {', '.join(names(LAUNCH_DIR))}",
            f"\nsdpo {HERE} PROGRAM starts no other processes.",
        ]
    )


def options_text(name: str) -> str:
    """The help of the options that the command adds to a launched program's own flags."""
    recipe = f"--recipe NAME ({', '.join(names(RECIPES_DIR))}) and " if name == "train" else ""
    return (
        f"sdpo {name} takes {recipe}--config NAME|FILE of accelerate "
        f"({', '.join(names(LAUNCH_DIR))}) beside these flags:"
    )


def run_on_devices(name: str, argv: list[str]) -> int:
    """Check a program's flags, then run it once per device: here where there is one.

    Raises:
        UserError: from the program, or there is no such --recipe or --config.
    """
    if {"-h", "--help"} & {*argv}:
        print(f"{options_text(name)}\n")
    config, argv = take_option("--config", argv)
    if name == "train":
        recipe, argv = take_option("--recipe", argv)
        if recipe:
            path = named_file("--recipe", recipe, RECIPES_DIR)
            argv = ["--config_file", str(path), "--output_dir", f"output/{path.stem}", *argv]
    launch_argv = further_arguments()
    if config:
        path = named_file("--config", config, LAUNCH_DIR)
        launch_argv = ["--config_file", str(path), *launch_argv]
    # Mistakes are answered here, once, and before torch is imported.
    code = run(name, ["--check_only", *argv])
    if "--check_only" in argv:
        return code

    program = ["-m", "sdpo.cli", HERE, name, *argv]
    return launch(program, lambda: run(name, argv), launch_argv)


def run(name: str, argv: list[str]) -> int:
    """Run a program in this process; returns its exit code.

    Raises:
        UserError: from the program.
    """
    main: Callable[..., int | None]
    if name == "train":
        main = runpy.run_path(str(TRAIN))["main"]
    else:
        main = import_module(PROGRAMS[name].module).main
    sys.argv = [f"sdpo {name}", *argv]
    return (main(argv) if inspect.signature(main).parameters else main()) or 0


def take_option(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """Take `--name VALUE` or `--name=VALUE` out of a command line.

    Returns: the last one's value or None, and the other arguments.

    Raises:
        UserError: it stands last, without a value.
    """
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        if argument == name:
            value = next(arguments, None)
            if value is None:
                raise UserError(f"{name} needs a name or a file")
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
        else:
            rest.append(argument)
    return value, rest


def names(directory: Path) -> list[str]:
    """The names of the YAML files in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def named_file(option: str, name: str, directory: Path) -> Path:
    """Find a YAML file by its name in `directory`, or by its path.

    Raises:
        UserError: there is none.
    """
    for path in (directory / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(names(directory))
    raise UserError(f"{option}: there is no {name}; there are {known}, or give a file")


def start() -> None:
    """Run `main` and exit; the entry point of the installed command."""
    program = next((word for word in sys.argv[1:3] if word in PROGRAMS), "")
    run_main(main, f"sdpo {program}".strip())


if __name__ == "__main__":
    start()

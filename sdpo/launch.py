"""Start a program once per CUDA device, as the scripts do: `python sdpo/launch.py PROGRAM ...`.

SDPO_LAUNCH_ARGS holds further arguments for accelerate's launcher. They come last and win, e.g. for
several machines: "--num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip 10.0.0.1".
"""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def further_arguments() -> list[str]:
    """Give the launcher's arguments that SDPO_LAUNCH_ARGS holds."""
    return shlex.split(os.environ.get("SDPO_LAUNCH_ARGS", ""))


def launch(program: list[str], here: Callable[[], int], launch_argv: list[str]) -> int:
    """Start a program once per CUDA device: where there is one at most, in this process, which has
    imported torch by then.

    Args:
        program: what accelerate's launcher is given: a file or -m and a module, and its arguments.
        here: runs the same in this process; returns its exit code.
        launch_argv: further arguments of the launcher, which win.
    """
    processes = 1
    if not configured(launch_argv):
        import torch

        processes = max(1, torch.cuda.device_count())
        if processes == 1 and not launch_argv:
            return here()
    from accelerate.commands.launch import launch_command, launch_command_parser

    args = launch_command_parser().parse_args([*launcher(processes, launch_argv), *program])
    start_all(args)
    launch_command(args)
    return 0


def configured(launch_argv: list[str]) -> bool:
    """Say whether the launcher's arguments name a configuration, which says it all."""
    return any(argument.split("=")[0] == "--config_file" for argument in launch_argv)


def launcher(processes: int, launch_argv: list[str]) -> list[str]:
    """Choose the arguments of accelerate's launcher.

    Args:
        processes: the CUDA devices of this machine, at least 1.
        launch_argv: further arguments, which win.
    """
    given = {argument.split("=")[0] for argument in launch_argv}
    own: list[str] = []
    # Said outright: left to guess, accelerate starts a single process where a machine has one GPU
    # of several machines, or where its own default configuration was made for another use.
    # Arguments would win over a configuration.
    if not configured(launch_argv):
        kinds = {"--multi_gpu", "--cpu", "--tpu"} & given or any(
            argument.startswith("--use_") for argument in given
        )
        if not kinds and (processes > 1 or "--num_machines" in given):
            own = ["--multi_gpu"]
        own += ["--num_processes", str(processes), "--num_machines", "1"]
    own += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*own, *launch_argv]


def start_all(args: argparse.Namespace) -> None:
    """Change the launcher's arguments so that it starts all processes that they ask for. By itself
    accelerate starts one, without a word, for --cpu, for a configuration of several on CPUs and
    where neither names a kind; all but MPI's."""
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    file: Any = load_config_from_file(args.config_file) if args.config_file else None
    count = args.num_processes or getattr(file, "num_processes", None) or 1
    if count == 1 or args.mpirun_hostfile or getattr(file, "mpirun_config", None):
        return
    kind = getattr(file, "distributed_type", "NO")
    on_cpus = args.cpu or getattr(file, "use_cpu", False) or kind == "MULTI_CPU"
    if on_cpus or not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args.cpu, args.use_cpu = False, True  # the latter divides the threads
    chosen = (args.multi_gpu, args.tpu, args.use_fsdp, args.use_deepspeed, args.use_megatron_lm)
    if kind in ("NO", "MULTI_CPU") and not any(chosen):
        args.multi_gpu = True  # whatever the device


def run_program(program: list[str]) -> int:
    """Run a file, or -m and a module, with its arguments in this process, as Python itself would;
    returns 0, or does not return."""
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    if Path(sys.path[0]) == Path(__file__).resolve().parent:
        # What Python itself would put first; the folder of this file has modules of any name.
        sys.path[0] = (
            os.getcwd() if sys.argv[1] == "-m" else str(Path(sys.argv[1]).resolve().parent)
        )
    launch(sys.argv[1:], lambda: run_program(sys.argv[1:]), further_arguments())

"""The package as it is installed: what the wheel holds, what it needs, and the command `sdpo`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import sdpo
from sdpo import cli, launch
from sdpo.common.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in cli.RECIPES_DIR.glob("*.yaml"))


@pytest.fixture(scope="module")
def project(repo) -> dict:
    with open(repo / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def requirements(path: Path) -> set[str]:
    """The lines of a requirements file, those it includes too."""
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= requirements(path.with_name(line[3:].strip()))
        elif line and not line.startswith("#"):
            found.add(line)
    return found


@pytest.mark.parametrize(
    ("extra", "file"), [("eval", "requirements.txt"), ("dev", "requirements-dev.txt")]
)
def test_extras_are_the_requirements_files(repo, project, extra, file):
    about = project["project"]

    def resolved(name: str) -> set[str]:
        found = set(about["dependencies"])
        for line in about["optional-dependencies"][name]:
            inner = re.fullmatch(r"sdpo\[(\w+)\]", line)
            found |= resolved(inner[1]) if inner else {line}
        return found

    assert resolved(extra) == requirements(repo / file)
    assert [re.match(r"\w+", line)[0] for line in about["dependencies"]] == ["torch"]


def test_constraints_name_what_the_requirements_name(repo):
    def names(lines) -> set[str]:
        return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}

    pinned = names(requirements(repo / "constraints.txt"))
    assert names(requirements(repo / "requirements-dev.txt")) <= pinned


@pytest.fixture(scope="module")
def wheel(repo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=repo, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_what_the_wheel_holds(repo, wheel):
    assert wheel.name == f"sdpo-{sdpo.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    info = f"sdpo-{sdpo.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sdpo", info}
    # Every file of the package, data too; and what the checkout keeps elsewhere.
    files = [path for path in (repo / "sdpo").rglob("*") if path.is_file()]
    own = {str(path.relative_to(repo)) for path in files if path.suffix != ".pyc"}
    elsewhere = {"sdpo/train.py", "sdpo/evaluation/generate/tinyworld.json"}
    elsewhere |= {f"sdpo/recipes/{name}.yaml" for name in RECIPES}
    elsewhere |= {f"sdpo/launch/{path.name}" for path in cli.LAUNCH_DIR.iterdir()}
    assert elsewhere.isdisjoint(own)
    assert {*own, *elsewhere} == {name for name in names if name.startswith("sdpo/")}
    for name in ("py.typed", "evaluation/compare/page/page.html", "recipes/sd15_dspo.yaml"):
        assert f"sdpo/{name}" in names


def empty_environment(directory: Path) -> Path:
    """Make a virtual environment with nothing in it; returns its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    (site,) = (directory / "lib").glob("python*/site-packages")
    return site


def environment_like_this(directory: Path) -> Path:
    """Make a virtual environment that has the packages of this one; returns its `bin`."""
    site = empty_environment(directory)
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(here))
    return directory / "bin"


def install(wheel: Path, binaries: Path, *options: str) -> None:
    """Have pip install the wheel into an environment, without a network."""
    command = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install"]
    done = subprocess.run(
        [*command, "--no-index", *options, str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def needed_by(requirement: str) -> dict[str, metadata.Distribution]:
    """The distributions here that one needs, itself and theirs too, by name."""
    found, seen, left = {}, set(), [Requirement(requirement)]
    while left:
        wanted = left.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        found[wanted.name] = metadata.distribution(wanted.name)
        for line in map(Requirement, found[wanted.name].requires or ()):
            extras = wanted.extras or {""}
            if line.marker is None or any(line.marker.evaluate({"extra": e}) for e in extras):
                left.append(line)
    return found


def answer(*command, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that does not see the checkout."""
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and "SDPO" not in k}
    return subprocess.run(
        [*map(str, command)],
        cwd=directory,
        env={**outside, **environment},
        capture_output=True,
        text=True,
    )


def test_the_losses_need_torch_alone(wheel, tmp_path):
    site = empty_environment(tmp_path / "alone")
    for distribution in needed_by("torch").values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    binaries = tmp_path / "alone" / "bin"
    # With its dependencies: pip would refuse if torch were not all that it needs.
    install(wheel, binaries)
    program = """
import importlib.util
import torch
from sdpo import loser_scale, preference_loss
assert not any(map(importlib.util.find_spec, ("numpy", "diffusers", "accelerate", "eval")))
pred = torch.arange(8.0).reshape(4, 2).requires_grad_()
out = preference_loss("dmpo", pred, pred.detach() + 0.1, 0 * pred, beta=1.0, mu=0.9)
out.loss.backward()
print(out.loss.item(), pred.grad.abs().sum().item(), loser_scale(pred[:2], pred[2:], 0.9).item())
"""
    done = answer(binaries / "python", "-W", "ignore", "-c", program, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    loss, gradient, scale = map(float, done.stdout.split())
    assert loss > 0
    assert gradient > 0
    assert scale == pytest.approx(0.1 * (0 + 1 + 4 + 9) / (0 * 4 + 1 * 5 + 2 * 6 + 3 * 7))
    done = answer(binaries / "sdpo", "--version", directory=tmp_path)
    assert done.stdout == f"{sdpo.__version__}\n"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """`sdpo` of the wheel, in an environment that has all else from this one."""
    binaries = environment_like_this(tmp_path_factory.mktemp("installed"))
    # In place of this environment's own installation, which is the checkout.
    install(wheel, binaries, "--no-deps", "--ignore-installed")
    return binaries / "sdpo"


def test_help_lists_the_programs_at_once():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sdpo.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - began < 2
    listed = re.findall(r"^  (\w+) {2,}\w", done.stdout, re.MULTILINE)
    assert listed == list(cli.PROGRAMS)
    for name in ("train", "evaluate", "score", "compare", "heldout", "audit", "sweep", "plot"):
        assert name in listed
    for name in RECIPES:
        assert name in done.stdout


def test_every_program_answers(capsys, monkeypatch):
    for name in cli.PROGRAMS:
        monkeypatch.setattr(sys, "argv", ["sdpo", "--here", name, "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize(("given", "named"), [([], "no command"), (["trian"], "trian")])
def test_unknown_programs_are_refused(monkeypatch, given, named):
    monkeypatch.setattr(sys, "argv", ["sdpo", *given])
    with pytest.raises(UserError, match=f"{named}: give one of train, "):
        cli.main()


@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [
        (8, "", "--multi_gpu --num_processes 8 --num_machines 1"),
        (1, "--num_machines 2 --num_processes 2", "--multi_gpu --num_processes 1 --num_machines 1"),
        (8, "--config_file mine.yaml", ""),
        (8, "--use_fsdp", "--num_processes 8 --num_machines 1"),
        (1, "--debug", "--num_processes 1 --num_machines 1"),
    ],
)
def test_how_processes_are_launched(gpus, given, expected):
    fixed = "--mixed_precision no --dynamo_backend no"
    assert launch.launcher(gpus, given.split()) == f"{expected} {fixed} {given}".split()


@pytest.mark.parametrize(
    ("given", "config", "processes", "on_cpus"),
    [
        ("--num_processes 2", None, 2, True),
        ("--cpu --num_processes=2", None, 2, True),
        ("--multi_gpu --num_processes 2", None, 2, True),
        ("--cpu", None, 1, True),
        ("", {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 3}, 3, True),
        ("--num_processes 2", {"distributed_type": "NO", "num_processes": 1}, 2, True),
        ("--cpu", {"distributed_type": "MULTI_GPU", "num_processes": 4}, 4, True),
        ("", {"distributed_type": "FSDP", "num_processes": 2}, 2, True),
        ("--num_processes 2", None, 2, False),  # on GPUs
        ("--cpu --num_processes 2", None, 2, True),
    ],
)
def test_all_processes_that_are_asked_for_start(
    monkeypatch, tmp_path, given, config, processes, on_cpus
):
    """accelerate's own launcher starts one for most of these."""
    from accelerate.commands import launch as accelerates

    calls = []
    for name, several in (("simple_launcher", False), ("multi_gpu_launcher", True)):

        def note(args, several=several):
            calls.append((args.num_processes if several else 1, args.use_cpu))

        monkeypatch.setattr(accelerates, name, note)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: not on_cpus)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "unset")
    argv = given.split()
    if config:
        file = tmp_path / "launch.yaml"
        file.write_text(yaml.safe_dump({"num_machines": 1, "mixed_precision": "no", **config}))
        argv = ["--config_file", str(file), *argv]
    assert launch.launch(["train.py"], lambda: pytest.fail("runs here"), argv) == 0
    assert calls == [(processes, on_cpus)]
    expected = "true" if on_cpus and processes > 1 else "unset"
    assert os.environ["ACCELERATE_USE_CPU"] == expected


def test_help_of_a_launched_program_names_the_commands_own_options(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sdpo", "train", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    own, _, flags = capsys.readouterr().out.partition("usage: ")
    assert "--recipe NAME (" in own and "sd15_dspo" in own and "--config NAME|FILE" in own
    assert "--max_train_steps" in flags


def test_the_command_runs_from_anywhere(installed, repo, tmp_path):
    """From the wheel, in a folder that is not the checkout's."""
    done = answer(installed, "compare", "--json_a", "A.json", directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("sdpo compare: error: ")
    program = "import sdpo.cli, sys; print(sdpo.cli.TRAIN); from sdpo.evaluation.generate.suites "
    program += "import PROMPTS_DIR, read_suite; print(len(read_suite('tinyworld').prompts))"
    program += "; print(PROMPTS_DIR)"
    done = answer(
        installed.with_name("python"), "-c", program, directory=tmp_path, XDG_CACHE_HOME="/cache"
    )
    train, prompts, directory = done.stdout.splitlines()
    assert Path(train).is_file()
    assert repo not in Path(train).parents
    assert int(prompts) == 128
    assert directory == "/cache/sdpo/prompts"


def test_set_up_installs_the_checkout_itself(repo, tmp_path):
    """scripts/_env.sh: once, found from any folder, and again where the checkout has moved."""
    binaries = environment_like_this(tmp_path / "environment")
    command = "source scripts/_env.sh; install_requirements requirements.txt"

    def set_up(root: Path, **environment: str) -> str:
        python = str(binaries / "python")
        environment = {"SDPO_PYTHON": python, "PIP_NO_INDEX": "1", **environment}
        done = answer("bash", "-c", command, directory=root, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def found() -> str:
        program = "import sdpo; print(sdpo.__file__)"
        return answer(binaries / "python", "-c", program, directory=tmp_path).stdout

    assert set_up(repo, SDPO_SKIP_INSTALL="1") == ""
    assert not (binaries / "sdpo").exists()
    assert "installing requirements.txt" in set_up(repo)
    assert found() == f"{repo}/sdpo/__init__.py\n"
    assert "quickstart" in answer(binaries / "sdpo", "--help", directory=tmp_path).stdout
    assert set_up(repo) == ""
    moved = tmp_path / "moved"
    for name in ("sdpo", "scripts", "prompts"):
        shutil.copytree(repo / name, moved / name)
    files = ["pyproject.toml", "README.md", "LICENSE", "train.py", "constraints.txt"]
    for name in [*files, "requirements.txt", "requirements-dev.txt"]:
        shutil.copy(repo / name, moved)
    assert "installing requirements.txt" in set_up(moved)
    assert found() == f"{moved}/sdpo/__init__.py\n"


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """What accelerate's launcher is given, instead of starting it; 8 CUDA devices are counted."""
    from accelerate.commands import launch as accelerates

    calls = []
    monkeypatch.setattr(accelerates, "launch_command", lambda args: calls.append(args))
    monkeypatch.setattr(
        accelerates,
        "launch_command_parser",
        lambda: SimpleNamespace(parse_args=lambda argv: argv),
    )
    monkeypatch.setattr(launch, "start_all", lambda args: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("SDPO_LAUNCH_ARGS", raising=False)
    return calls


@pytest.mark.parametrize(("gpus", "started"), [(8, True), (1, False)])
def test_training_is_checked_once_and_started_on_every_device(monkeypatch, launched, gpus, started):
    ran = []
    monkeypatch.setattr(cli, "run", lambda *call: ran.append(call) or 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    recipe = ["--config_file", str(cli.RECIPES_DIR / "sd15_dspo.yaml")]
    argv = [*recipe, "--output_dir", "output/sd15_dspo", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["sdpo", "train", "--recipe", "sd15_dspo", "--seed", "3"])
    assert cli.main() == 0
    expected = [("train", ["--check_only", *argv])]
    here = ["-m", "sdpo.cli", "--here", "train", *argv]
    if started:
        assert launched == [[*launch.launcher(gpus, []), *here]]
    else:
        expected.append(("train", argv))
        assert launched == []
    assert ran == expected


def test_a_launch_configuration_says_it_all(monkeypatch, launched):
    monkeypatch.setattr(cli, "run", lambda *call: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("devices are counted"))
    monkeypatch.setenv("SDPO_LAUNCH_ARGS", "--machine_rank 1")
    monkeypatch.setattr(sys, "argv", ["sdpo", "evaluate", "--config=2x8gpu", "--unet", "base"])
    assert cli.main() == 0
    given = ["--config_file", str(cli.LAUNCH_DIR / "2x8gpu.yaml"), "--machine_rank", "1"]
    here = ["-m", "sdpo.cli", "--here", "evaluate", "--unet", "base"]
    assert launched == [[*launch.launcher(8, given), *here]]
    assert "--num_processes" not in launched[0]
    monkeypatch.setattr(sys, "argv", ["sdpo", "evaluate", "--config", "16gpu"])
    with pytest.raises(UserError, match="--config: there is no 16gpu; there are 1gpu, 2x8gpu"):
        cli.main()


@pytest.mark.parametrize("by", ["file", "module"])
def test_one_process_finds_what_python_itself_would_give_it(tmp_path, by):
    """Arguments, its own name and the first place of imports, a folder of the caller's."""
    (tmp_path / "beside").mkdir()
    for place in (tmp_path, tmp_path / "beside"):
        (place / "near.py").write_text(f"PLACE = {str(place)!r}")
    text = "import sys, near; print(near.PLACE, __name__, sys.argv); sys.exit(3)"
    (tmp_path / "beside" / "program.py").write_text(text)
    (tmp_path / "module.py").write_text(text)
    program = ["beside/program.py"] if by == "file" else ["-m", "module"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    environment.pop("SDPO_LAUNCH_ARGS", None)
    found = [
        subprocess.run(
            [sys.executable, *command, *program, "--a", "b c"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        for command in ([], [str(REPO / "sdpo" / "launch.py")])
    ]
    assert found[0].stdout and found[0].stdout == found[1].stdout
    assert [done.returncode for done in found] == [3, 3]


def test_recipes_from_anywhere(installed, tiny_sd15, pairs_dir, tmp_path):
    """From the wheel, whose recipes and train.py lie in the package."""
    flags = ["--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir]
    command = [installed, "train", "--check_only", "--recipe", "sd15_dspo", *flags]
    done = answer(*command, directory=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = answer(*command, "--beta_dpo", "-1", directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "sdpo train: error: --beta_dpo must be a number above 0, got -1.0\n"
    assert list(tmp_path.iterdir()) == []

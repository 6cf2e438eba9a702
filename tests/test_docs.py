"""What README.md and docs/ name is there: files, flags, commands, tests, figures, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))]
LINKED = [*PAGES, "assets/README.md"]
LINKED += [name for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (REPO / name).is_file()]
SECTIONS = ("model", "data", "method", "safeguard", "optim", "run")


def read(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Every command of the pages' bash blocks, taken apart as a shell does."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def text():
    return "\n".join(map(read, PAGES))


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    text = read(page)
    folders = "scripts|sdpo|tests|assets|eval|prompts|docs"
    named = set(re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", text))
    for module in re.findall(r"python -m (sdpo[\w.]+)", text):
        path = module.replace(".", "/")
        named.add(f"{path}/__main__.py" if (REPO / path).is_dir() else f"{path}.py")
    # A recipe's script is named by its file alone in the table of recipes.
    named |= {f"scripts/train/{name}" for name in re.findall(r"`((?:sd15|sdxl)_\w+\.sh)`", text)}
    missing = [name for name in named if not (REPO / name).exists()]
    assert not missing


def test_paths_are_named(text):
    assert len(set(re.findall(r"(?:scripts|sdpo|eval|docs)/[\w./-]*\w", text))) > 40


PROGRAMS = (
    ["train.py"],
    ["eval/evaluate.py"],
    ["eval/compare.py"],
    ["-m", "sdpo.lab", "sweep"],
    ["-m", "sdpo.lab", "audit"],
    ["-m", "sdpo.lab", "plot"],
    ["-m", "sdpo.evaluation.heldout"],
    ["-m", "sdpo.training.export"],
)


def test_flags_exist(text):
    known = set()
    for program in PROGRAMS:
        command = [sys.executable, *program, "--help"]
        helped = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
        found = set(re.findall(r"--[a-zA-Z][\w-]*", helped.stdout))
        assert helped.returncode == 0 and len(found) > 2, helped.stderr
        known |= found
    launcher = {"--num_machines", "--num_processes", "--machine_rank", "--main_process_ip"}
    launcher |= {"--main_process_port", "--config", "--recipe"}
    launcher |= {"--cpu", "--multi_gpu", "--nproc_per_node"}
    # Of other programs: the quickstart, prompts/build.py, and scripts/bench.
    other = {"--method", "--steps", "--out", "--repeats", "--no-NAME", "--source"}
    other |= {"--variants", "--pairs", "--step_json", "--rows", "--batches", "--turns"}
    other |= {"--extra-index-url"}  # pip's
    other |= {"--images", "--base", "--tiny", "--parts", "--tests", "--size", "--prompts"}
    named = set(re.findall(r"--[a-zA-Z][\w-]*", text))
    assert len(named) > 100
    assert named <= known | launcher | other, named - known - launcher - other


def test_training_commands_parse(text, tmp_path, monkeypatch):
    """Each `python train.py` and `bash scripts/train/...` is one that train.py takes."""
    from sdpo.config import parse_train

    monkeypatch.chdir(REPO)
    (example,) = [block for block in blocks(text, "yaml") if "# run.yaml" in block]
    (tmp_path / "run.yaml").write_text(example)
    seen = 0
    for words in commands(text):
        words = [str(tmp_path / word) if word == "run.yaml" else word for word in words]
        while "=" in words[0]:
            words = words[1:]
        if words[:2] == ["python", "train.py"]:
            config = parse_train(words[2:])
        elif words[0] == "bash" and words[1].startswith("scripts/train/"):
            if "--config" in words:
                place = words.index("--config")
                assert (REPO / "scripts/configs" / f"{words[place + 1]}.yaml").is_file()
                del words[place : place + 2]
            recipe = f"scripts/recipes/{Path(words[1]).stem}.yaml"
            config = parse_train(["--config_file", recipe, *words[2:]])
        else:
            continue
        assert config.data.location
        seen += 1
    assert seen >= 8


def test_every_flag_of_training_is_explained():
    """TRAINING.md holds the flags of the config by section, in its order, with their defaults."""
    from sdpo.common.flags import flag_names
    from sdpo.config import TrainConfig

    found: dict[str, list[str]] = {name: [] for name in SECTIONS}
    cells = {}
    for heading, rows in re.findall(
        r"^### (\w+)\n\n\| flag .*\n\|[-|]+\n((?:\|.*\n)+)", read("docs/TRAINING.md"), re.MULTILINE
    ):
        for name, default, about in re.findall(r"^\| `--(\w+)` \| (.*?) \| (.+) \|$", rows, re.M):
            found[heading].append(name)
            cells[name] = default
            assert about.strip()
    expected: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for name, section in flag_names(TrainConfig).items():
        expected[section].append(name)
    assert found == expected

    written = {"True": "on", "False": "off", "None": "none", "": "none", "()": "none"}
    for section in fields(TrainConfig):
        for member in fields(section.default_factory):
            cell = cells[member.name]
            if cell == "required" or member.metadata["flag"].shown:
                continue
            if type(member.default) in (int, float):
                assert float(cell) == member.default, member.name
            else:
                assert cell == written.get(str(member.default), str(member.default)), member.name


def test_example_sweep_is_one(text, pairs_dir, tmp_path, monkeypatch):
    from sdpo.lab.sweep.file import read_sweep

    monkeypatch.chdir(REPO)
    (example,) = [block for block in blocks(text, "yaml") if "grid:" in block]
    assert "output/quickstart/pairs" in example
    path = tmp_path / "scales.yaml"
    path.write_text(example.replace("output/quickstart/pairs", str(pairs_dir)))
    sweep = read_sweep(path)
    assert len(sweep.runs) == 3 * 2 * 3
    assert sweep.heldout and sweep.images


def test_no_placeholder_is_left(text):
    assert not re.search(r"^[A-Z_]{6,}$|\bTODO\b|\bTBD\b", text, re.MULTILINE)


def test_named_tests_exist():
    text = read("docs/METHOD.md")
    # `::test_name` alone is of the file named last.
    named, file = [], None
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", text):
        file = path or file
        if path or test:
            named.append((file, test))
    assert len([test for _, test in named if test]) > 12
    for file, test in named:
        source = read(file)
        assert not test or f"def {test}(" in source, f"{file}::{test}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: list[str] = []
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M
    ):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@pytest.mark.parametrize("name", LINKED)
def test_pictures_and_links_lead_somewhere(name):
    path = REPO / name
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), link
        assert page.is_relative_to(REPO), link
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", ["docs/METHOD.md", "docs/LAB.md"])
def test_figures_named_are_what_the_lab_writes_or_linked(page):
    from sdpo.lab.tiny.report import PICTURES

    named = set(re.findall(r"(?<!\[)`(\w+\.png)`", read(page)))
    assert named <= set(PICTURES), named - set(PICTURES)


def test_pictures_are_used_and_small(text):
    for path in (REPO / "docs").rglob("*.png"):
        assert f"({path.relative_to(REPO / 'docs').as_posix()})" in text, path
    for path in (REPO / "docs" / "troubleshooting").glob("*.png"):
        assert path.stat().st_size < 120_000, path


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text = read(page)
    for script in re.findall(r"(scripts/[\w/.-]+\.(?:sh|yaml))", text):
        assert (REPO / script).is_file(), script
    from sdpo.lab.__main__ import COMMANDS

    for command in re.findall(r"sdpo\.lab (\w+)", text):
        assert command in COMMANDS

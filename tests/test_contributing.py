"""What CONTRIBUTING.md names is there, and its examples do what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def page(repo):
    return (repo / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy(repo, page, tmp_path_factory):
    """A copy of the project with the page's examples; runs a program in it."""
    directory = tmp_path_factory.mktemp("copy")
    shutil.copytree(repo / "sdpo", directory / "sdpo", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(repo / "train.py", directory)
    examples = re.findall(r"```python\n# (\S+)\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 2
    for path, code in examples:
        assert not (repo / path).exists(), f"the example {path} would hide a file"
        (directory / path).write_text(code)

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(directory)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_one_page(page):
    assert len(page.splitlines()) <= 130


def test_paths_exist(repo, page):
    named = set(re.findall(r"`((?:tests|sdpo|scripts|docs)/[\w/.]*)`", page))
    named -= {path for path in named if re.search("NAME|FAMILY", path)}
    assert len(named) > 4
    assert [path for path in named if not (repo / path).exists()] == []


def test_rooms_are_those_of_the_test(page):
    from test_layers import ORDER

    said = " ".join(page.split()).partition("only rooms below it: ")[2].partition(" (")[0]
    rooms = [tuple(level.split(", ")) for level in said.replace("< ", "<").split(" <")]
    assert [{room.strip() for room in level} for level in rooms] == [set(level) for level in ORDER]


def test_method(copy):
    listed = copy("train.py", "--help")
    assert re.search(r"\{[^}]*\bipo\b[^}]*\}", listed)
    found = copy(
        "-c",
        "import torch, sdpo; x = torch.arange(4.0).reshape(4, 1).requires_grad_();"
        "out = sdpo.preference_loss('ipo', x, 0 * x, 0 * x, beta=0.5, mu=0.9);"
        "out.loss.backward(); print(out.loss.item(), *x.grad.flatten().tolist())",
    )
    loss, *gradient = map(float, found.split())
    # Errors 0, 1 of the winners and 4, 9 of the losers: margins -4 and -8, target -1.
    assert loss == pytest.approx(((-4 + 1) ** 2 + (-8 + 1) ** 2) / 2)
    # The losers' gradient is that of -margin^2 times (1 - 0.9) |r_w|^2 / <r_w, r_l> = 0.1 / 3.
    free = [0, 2 * -7 * 2 / 2, 2 * -3 * -4 / 2, 2 * -7 * -6 / 2]
    scaled = [*free[:2], free[2] * 0.1 / 3, free[3] * 0.1 / 3]
    assert gradient == pytest.approx(scaled)


def test_scorer(copy):
    found = copy(
        "-c",
        "import torch; from sdpo.evaluation.score.scorers import get_scorer, scorer_names;"
        "assert 'contrast' in scorer_names();"
        "views = torch.zeros(2, 3, 4, 4, dtype=torch.uint8); views[1, :, :2] = 255;"
        "scorer = get_scorer('contrast')(None, torch.device('cpu'));"
        "print(*scorer.score(views, ['', '']).tolist())",
    )
    flat, halves = map(float, found.split())
    assert flat == 0
    assert halves == pytest.approx(0.5, abs=0.01)


def test_family(copy):
    found = copy(
        "-c",
        "import torch; from sdpo.models.sd15 import SD15; from sdpo.models.sd2 import SD2;"
        "from sdpo.tinyworld.architecture import build_pipeline;"
        "pipeline = build_pipeline('sd15', 'micro'); unet = pipeline.unet.eval();"
        "width, channels = unet.config.cross_attention_dim, unet.config.in_channels;"
        "x, told = torch.randn(2, channels, 16, 16), {'hidden': torch.randn(2, 5, width)};"
        "t = torch.tensor([3, 700]); torch.set_grad_enabled(False);"
        "new, known = SD2(), SD15(); schedule = new.process(pipeline.scheduler, (4, 16, 16));"
        "print(torch.equal(new.predict(unet, x, t, told), known.predict(unet, x, t, told)),"
        "schedule.target(x, 2 * x, t).equal(2 * x), new.name)",
    )
    assert found.split() == ["True", "True", "sd2"]

"""What docs/ names is there: tests, figures, commands and links."""

from __future__ import annotations

import re

import pytest


@pytest.fixture(scope="module", params=["METHOD.md", "LAB.md"])
def page(request, repo):
    path = repo / "docs" / request.param
    return path, path.read_text(encoding="utf-8")


def test_named_tests_exist(repo):
    text = (repo / "docs" / "METHOD.md").read_text(encoding="utf-8")
    # `::test_name` alone is of the file named last.
    named, file = [], None
    for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", text):
        file = path or file
        if path or test:
            named.append((file, test))
    assert len([test for _, test in named if test]) > 12
    for file, test in named:
        source = (repo / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file}::{test}"


def test_pictures_and_links_lead_somewhere(page):
    path, text = page
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_figures_named_are_what_the_lab_writes(repo, page):
    from sdpo.lab.tiny.report import PICTURES

    _, text = page
    named = set(re.findall(r"`(\w+\.png)`", text))
    assert named <= set(PICTURES), named - set(PICTURES)


def test_commands_exist(repo, page):
    _, text = page
    for script in re.findall(r"(scripts/[\w/.-]+\.(?:sh|yaml))", text):
        assert (repo / script).is_file(), script
    from sdpo.lab.__main__ import COMMANDS

    for command in re.findall(r"sdpo\.lab (\w+)", text):
        assert command in COMMANDS

"""Command lines from dataclasses: types, ranges, sections, configuration files, mistakes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from sdpo.common.errors import UserError
from sdpo.common.flags import (
    ABOVE_ZERO,
    at_least,
    build_parser,
    flag,
    flag_names,
    flat,
    from_flat,
    parse,
)


@dataclass(frozen=True)
class Inner:
    rate: float = flag(0.5, "how fast", check=ABOVE_ZERO)
    steps: int | None = flag(None, "how long", check=at_least(1), replaces="epochs", shown="ten")
    epochs: int | None = flag(None, "how often", check=at_least(1), replaces="steps")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    place: Path = flag(Path("here"), "where", expand=True)
    words: tuple[str, ...] = flag((), "what", lines=True)
    kind: Literal["a", "b"] = flag("a", "which", choices=("a", "b"))
    on: bool = flag(False, "whether", name="switch")
    hidden: bool = flag(False, "not kept", record=False)
    folder: str = flag("here", "where too", expand=True)
    other: str | None = flag(None, "another, or none", expand=True, empty=True)


def parsed(*argv):
    return parse(Outer, argv, "program")


def test_values_have_their_types():
    found = parsed(
        "--rate", "2", "--place", "there", "--words", "x", "y", "--switch", "--steps", "3"
    )
    assert found == Outer(Inner(2.0, 3, None), Path("there"), ("x", "y"), "a", True)
    assert parsed() == Outer()


def test_the_last_of_two_that_replace_each_other_counts():
    assert parsed("--steps", "3", "--epochs", "2").inner == Inner(0.5, None, 2)
    assert parsed("--epochs", "2", "--steps", "3").inner == Inner(0.5, 3, None)


def test_a_path_can_be_taken_back():
    assert parsed("--other", "x", "--other", "").other == ""


def test_a_switch_can_be_taken_back():
    assert parsed("--switch", "--no-switch").on is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rate", "0"], "--rate must be a number above 0, got 0.0"),
        (["--rate", "nan"], "--rate must be a number above 0"),
        (["--rate", "1e39"], r"--rate must be at most 3\.4e38 in size, as float32 is, got 1e\+39"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--kind", "c"], "--kind"),
        (["--rat", "1"], r"unrecognized arguments: --rat 1; did you mean --rate\? \(see --help\)"),
        (["--s=1"], r"unrecognized arguments: --s=1 \(see --help\)"),
        (["--words", "gone.txt"], "--words: there is no file gone.txt"),
        (["--folder", ""], "--folder is empty: give a path, or leave it out"),
    ],
)
def test_mistakes_name_the_flag(argv, said):
    with pytest.raises(UserError, match=said):
        parsed(*argv)


def test_home_and_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words.txt").write_text("one\n\n two \n")
    found = parsed("--place=~/x", "--words", "~/words.txt")
    assert found.place == tmp_path / "x"
    assert found.words == ("one", " two ")


def test_round_trip_through_a_flat_dict():
    found = parsed("--words", "x", "--switch", "--steps", "4", "--hidden")
    values = json.loads(json.dumps(flat(found), default=str))
    assert "hidden" not in values
    assert values["words"] == ["x"]
    again = from_flat(Outer, {**values, "place": Path(values["place"]), "unknown": 1})
    assert flat(again) == flat(found)


def test_names_say_their_section():
    names = flag_names(Outer)
    assert names["rate"] == names["steps"] == "inner"
    assert names["switch"] == ""
    assert "on" not in names


def test_help_shows_defaults_and_sections():
    text = " ".join(build_parser(Outer, "program").format_help().split())
    for part in ("inner:", "how fast (default: 0.5)", "how long (default: ten)", "--config_file"):
        assert part in text
    assert "whether (default" not in text


@pytest.fixture
def file(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_file_gives_the_same_as_flags_and_flags_win(file):
    path = file("inner:\n  rate: 3e-1\n  steps: 7\nwords: [x, y]\nswitch: true\nhidden: false\n")
    assert parsed("--config_file", path) == parsed(
        *("--rate", "0.3", "--steps", "7", "--words", "x", "y", "--switch")
    )
    found = parsed("--rate", "0.9", f"--config_file={path}", "--no-switch", "--epochs", "1")
    assert found.inner == Inner(0.9, None, 1)
    assert found.on is False
    flat_json = file(json.dumps({"rate": 0.25, "steps": None}), "run.json")
    assert parsed("--config_file", flat_json).inner == Inner(0.25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rat: 1\n", "there is no flag rat"),
        ("inner:\n  words: [x]\n", "there is no flag words"),
        ("inner: 3\n", "inner is a section"),
        ("words:\n  x: 1\n", "words must be a value"),
        ("rate: fast\n", "--rate"),
        ("rate: true\n", "--rate"),
        ("rate: 1\nrate: 2\n", "rate is given twice"),
        ("inner:\n  rate: 1\n  rate: 2\n", "rate is given twice"),
        ("- rate\n", "must hold names and values"),
        ("rate: [\n", "cannot read"),
        ("switch: 7\n", "switch must be true or false, got 7"),
        ("inner:\n  steps: 0\n", "--steps must be at least 1, got 0"),
    ],
)
def test_a_files_mistakes_name_the_file(file, text, said):
    path = file(text)
    with pytest.raises(UserError, match=said) as caught:
        parsed("--config_file", path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"--config_file: there is no file none\.yaml"):
        parsed("--config_file", "none.yaml")

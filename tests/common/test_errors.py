"""How a program ends: its exit code, and at most one line."""

from __future__ import annotations

import pytest

from sdpo.common.errors import UserError, first_line, run_main


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: 0, 0, ""),
        (lambda: None, 0, ""),
        (lambda: 7, 7, ""),
        (raising(UserError("--flag: no")), 2, "prog: error: --flag: no\n"),
        (raising(KeyboardInterrupt()), 130, "\nprog: interrupted\n"),
    ],
)
def test_run_main(main, code, said, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main, "prog")
    assert end.value.code == code
    assert capsys.readouterr().err == said


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0, "prog")


def test_first_line():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"

"""Programs run as parts of another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sdpo.common.errors import UserError
from sdpo.common.files import program
from sdpo.common.programs import run_step, run_together

MARK = "import sys; from pathlib import Path; Path(sys.argv[1]).touch();"


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_they_run_side_by_side(tmp_path):
    """Each waits for the other."""
    code = MARK + "exec('while not Path(sys.argv[2]).exists(): pass')"
    a, b = tmp_path / "a", tmp_path / "b"
    run_together({"a": python(code, a, b), "b": python(code, b, a)})
    assert a.exists()
    assert b.exists()
    run_together({})


def test_one_that_fails_is_named_when_all_have_ended(tmp_path):
    bad = python("raise SystemExit(3)")
    with pytest.raises(UserError, match="the sweep ended with exit code 3"):
        run_step(bad, "the sweep")
    good = python("import time; time.sleep(0.5);" + MARK, tmp_path / "done")
    with pytest.raises(UserError, match="bad ended with exit code 3"):
        run_together({"bad": bad, "good": good})
    assert (tmp_path / "done").exists()


def test_sigterm_ends_the_programs_first(tmp_path):
    """One ends this process, as it were, and both save before it ends."""
    save = (
        "import os, signal, sys, time; from pathlib import Path;"
        "signal.signal(signal.SIGTERM, lambda *a: (Path(sys.argv[1]).touch(), sys.exit(143)));"
    )
    ready, a, b = (tmp_path / name for name in ("ready", "a", "b"))
    waits = save + "Path(sys.argv[2]).touch(); time.sleep(100)"
    kills = save + (
        "exec('while not Path(sys.argv[2]).exists(): pass');"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    )
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(SystemExit) as raised:
        run_together({"a": python(waits, a, ready), "b": python(kills, b, ready)})
    assert raised.value.code == 143
    assert a.exists()
    assert b.exists()
    assert time.monotonic() - started < 60
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("path", ["train.py", "eval/evaluate.py"])
def test_a_program_of_the_checkout_starts_where_nothing_is_installed(path, repo):
    """As a child of `python -m sdpo.lab` in a checkout: from its root, without PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [*program(path), "--no_such_flag"]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--no_such_flag" in done.stderr

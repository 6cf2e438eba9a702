"""Programs side by side: their end, their failures, and what outlives a kill. The programs here are
one-liners; sweeps of train.py are in tests/e2e/test_sweep.py."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sdpo.common.programs import Stopped
from sdpo.lab.sweep import run as sweeps
from sdpo.lab.sweep.devices import own_devices
from sdpo.lab.sweep.run import last_line, run_all, sweep_programs
from sdpo.lab.sweep.stages import Stage


@pytest.fixture
def lock(tmp_path):
    """A file that programs keep open."""
    with open(tmp_path / "lock", "w") as file:
        yield file


@pytest.fixture
def children(lock):
    return sweep_programs(3, lock.fileno())


def python(code):
    return [sys.executable, "-c", code]


class Nothing:
    """Stands for a sweep where only its name matters."""

    name = "nothing"


def run(chains, children, out, monkeypatch, jobs=2):
    tables = []
    monkeypatch.setattr("sdpo.lab.sweep.results.write_results", lambda *args: tables.append(args))
    failed = run_all(Nothing(), out, chains, children, [{}] * jobs)
    assert len(tables) == len(chains)
    return failed


def test_programs_get_their_share_of_threads_and_a_log(lock, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    children = sweep_programs(3, lock.fileno())
    log = tmp_path / "logs" / "a.log"
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('to stderr')"
    assert children.run(python(code), log) == 1
    assert log.read_text() == "3\nto stderr\n"
    assert children.run(python("print('more')"), log) == 0
    assert log.read_text() == "3\nto stderr\nmore\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    sweep_programs(3, lock.fileno()).run(python(code), log)
    assert log.read_text().endswith("more\n5\nto stderr\n")


def test_runs_at_one_time_have_a_place_each(children, tmp_path, monkeypatch):
    code = "import os, time; print(os.environ['PLACE'], time.time()); time.sleep(0.3);"
    code += "print(os.environ['PLACE'], time.time())"

    def chain():
        commands = [python(code)]
        return [Stage("stage", lambda: commands[:], commands.clear)]

    monkeypatch.setattr("sdpo.lab.sweep.results.write_results", lambda *args: None)
    places = [{"PLACE": "a"}, {"PLACE": "b"}]
    chains = {name: chain() for name in "12345"}
    assert not run_all(Nothing(), tmp_path, chains, children, places)
    times: dict[str, list[float]] = {"a": [], "b": []}
    for log in sorted((tmp_path / "logs").iterdir(), key=lambda log: log.stat().st_mtime):
        for line in log.read_text().splitlines():
            times[line.split()[0]].append(float(line.split()[1]))
    assert len(times["a"] + times["b"]) == 10 and all(times.values())
    # At one place one after the other.
    assert all(found == sorted(found) for found in times.values())


@pytest.mark.parametrize(
    ("visible", "count", "places"),
    [
        (None, 0, []),
        (None, 1, [{}]),
        ("3", 1, [{}]),
        (None, 2, ["0", "1"]),
        ("5,GPU-8f", 2, ["5", "GPU-8f"]),
    ],
)
def test_devices_are_those_that_the_sweep_may_use(visible, count, places, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: count)
    named = [p if isinstance(p, dict) else {"CUDA_VISIBLE_DEVICES": p} for p in places]
    assert own_devices() == named


def test_last_line_is_the_last_that_says_something(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n 10%|#\r 20%|##\rtrain.py: error: \xff\n\n")
    assert last_line(log) == "train.py: error: �"
    log.write_bytes(b"")
    assert last_line(log) == "nothing"


def test_a_failing_chain_is_reported_and_the_others_go_on(children, tmp_path, monkeypatch, capsys):
    done = []

    def stage(name, code):
        commands = [python(code)]
        # A command that was run is missing no more.
        return Stage(name, lambda: commands[:], lambda: (done.append(name), commands.clear()))

    chains = {
        "bad": [stage("one", "import sys; print('first'); sys.exit('why')"), stage("two", "")],
        "good": [stage("three", ""), stage("four", "")],
        "empty": [Stage("five", lambda: [["true"]])],
    }
    failed = run(chains, children, tmp_path, monkeypatch)
    assert sorted(failed) == ["bad", "empty"]
    assert done == ["three", "four"]
    said = capsys.readouterr().err
    assert f"bad: one ended with exit code 1: why (see {tmp_path / 'logs' / 'bad.log'})" in said
    assert "empty: five ended without its result" in said


def test_as_many_at_a_time_as_jobs(children, tmp_path, monkeypatch):
    """Each program waits until two have begun: one job alone would never end."""
    code = (
        "import pathlib, sys, time; here = pathlib.Path(sys.argv[1]);"
        "(here / sys.argv[2]).touch()\n"
        "while len(list(here.glob('begun-*'))) < 2: time.sleep(0.01)"
    )
    chains = {}
    for name in ("begun-1", "begun-2"):
        command = [*python(code), str(tmp_path), name]
        left = [command]
        chains[name] = [Stage("s", lambda left=left: left[:], left.clear)]
    assert run(chains, children, tmp_path, monkeypatch) == []


def test_stop_ends_programs_and_starts_no_more(children, tmp_path):
    log = tmp_path / "log"
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit('saved'));"
        "print('ready', flush=True); time.sleep(100)"
    )
    raised = []

    def wait():
        with pytest.raises(Stopped):
            children.run(python(code), log)
        raised.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    while not log.is_file() or "ready" not in log.read_text():
        time.sleep(0.01)
    children.stop()
    thread.join(30)
    assert raised
    assert last_line(log) == "saved"
    with pytest.raises(Stopped):
        children.run(python("print('late')"), log)
    assert "late" not in log.read_text()


def test_sigterm_ends_a_sweep_and_its_programs(children, tmp_path, capsys):
    """A chain of two stages, ended in the first."""
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(143));"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    )
    late = tmp_path / "late"
    stages = [
        Stage("one", lambda: [python(code)]),
        Stage("two", lambda: [["touch", str(late)]]),
    ]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised:
        run_all(Nothing(), tmp_path, {"a": stages}, children, [{}])
    assert raised.value.code == 143
    assert not late.exists()
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_lock_lasts_as_long_as_a_program_that_a_killed_sweep_left(tmp_path):
    """The parent is killed, its program lives on and keeps the lock to its end."""
    code = (
        "import fcntl, sys; from pathlib import Path;"
        "from sdpo.lab.sweep.run import sweep_programs;"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "command = [sys.executable, '-c', sys.argv[2]];"
        "sweep_programs(1, file.fileno()).run(command, Path(sys.argv[3]))"
    )
    child = "import os, sys; print(os.getpid(), flush=True); input_ = open(%r).read()"
    fifo, log, path = tmp_path / "fifo", tmp_path / "log", tmp_path / "lock"
    os.mkfifo(fifo)
    parent = subprocess.Popen([*python(code), str(path), child % str(fifo), str(log)])
    while not log.is_file() or not log.read_text().endswith("\n"):
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    with open(path, "w") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fifo.write_text("go")
        fcntl.flock(file, fcntl.LOCK_EX)


def test_a_sweep_waits_for_another_in_its_directory(tmp_path, capfd):
    entered = []

    def second():
        with sweeps._locked(tmp_path):
            entered.append(True)

    with sweeps._locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        said = ""
        while "waiting for its end" not in said:
            said += capfd.readouterr().err
            time.sleep(0.01)
        assert not entered
    thread.join(30)
    assert entered

"""Statistics, tables, what a result says of the machine, and workers that take turns."""

from __future__ import annotations

import json
import re

import pytest

from scripts.bench.common import Worker, print_table, ratios, spread, write_result
from sdpo.common.errors import UserError


def test_spread():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {
        "median": 3.0,
        "quartile_1": 2.0,
        "quartile_3": 4.0,
        "least": 1.0,
        "largest": 5.0,
        "count": 5,
    }
    assert spread([7.0])["quartile_1"] == spread([7.0])["quartile_3"] == 7.0


def test_a_drift_of_the_machine_cancels_in_ratios():
    # Twice as slow throughout, on a machine that becomes ten times slower.
    baseline = [1.0, 2.0, 5.0, 10.0]
    found = ratios([2 * value for value in baseline], baseline)
    assert found["median"] == found["least"] == found["largest"] == 2.0


def test_table_is_aligned(capsys):
    print_table(["name", "s"], [["a", 10], ["longer", "3"]])
    assert capsys.readouterr().out.splitlines() == ["name     s", "a       10", "longer   3"]


def test_a_result_says_what_made_it(tmp_path, monkeypatch, repo, capsys):
    monkeypatch.setattr("sys.argv", ["step.py", "--steps", "2"])
    path = tmp_path / "new" / "x.json"
    write_result(path, "step.py", {"figures": [1]})
    found = json.loads(path.read_text())
    assert found["command"] == "python scripts/bench/step.py --steps 2"
    assert found["figures"] == [1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0
    assert "torch" in found["versions"]
    import socket

    assert socket.gethostname() not in path.read_text().replace("localhost", "")
    assert str(repo) not in path.read_text()


ECHO = """
import json, sys
print("noise")
print(json.dumps({"ready": True}), flush=True)
for number, _ in enumerate(sys.stdin):
    if number == 2:
        sys.exit("the worker's last words")
    print(json.dumps({"turn": number}), flush=True)
"""


def test_a_worker_answers_turn_by_turn_and_its_end_is_one_sentence():
    worker = Worker("echo", ["-c", ECHO])
    try:
        worker.ready()
        assert [worker.turn(), worker.turn()] == [{"turn": 0}, {"turn": 1}]
        with pytest.raises(UserError, match="echo ended with exit code 1: the worker's last words"):
            worker.turn()
    finally:
        worker.close()

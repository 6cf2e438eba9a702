"""Files of JSON lines: what is dropped of one that is taken up, and how much of it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdpo.common.jsonl import CountedLines, JsonLines, read_lines


def lines_up_to(count: int) -> list[bytes]:
    """Lines of unlike lengths, entry i with "n": i."""
    return [json.dumps({"n": i, "x": "é" * (i * 7 % 13)}).encode() + b"\n" for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_any_cut_leaves_the_whole_lines_that_are_kept(tmp_path, count):
    path, lines = tmp_path / "a.jsonl", lines_up_to(count)
    text = b"".join(lines)
    for size in range(len(text) + 1):
        for keep in range(count + 1):
            path.write_bytes(text[:size])
            JsonLines(path, lambda entry, keep=keep: entry["n"] < keep).close()
            # A line that lacks its end alone is whole.
            whole = [
                line for i, line in enumerate(lines) if size >= len(b"".join(lines[: i + 1])) - 1
            ]
            assert path.read_bytes() == b"".join(whole[:keep]), (size, keep)


def test_what_a_crash_left_at_the_end_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    for rest in (b"\0" * 5000, b"\xff\n", b"\n\n", b'{"n": 1e\n'):
        path.write_bytes(lines_up_to(1)[0] + rest)
        lines = CountedLines(path)
        assert lines.count == 1
        lines.write({"n": 1})
        lines.close()
        assert lines.count == 2
        assert [entry["n"] for entry in read_lines(path)] == [0, 1]


def test_few_of_many_lines_are_read(tmp_path: Path):
    path, asked = tmp_path / "a.jsonl", []

    def keep(entry: dict[str, Any]) -> bool:
        asked.append(entry["n"])
        return entry["n"] < 70_000

    path.write_bytes(b"".join(lines_up_to(100_000)))
    JsonLines(path, keep).close()
    assert len(asked) < 30
    assert path.read_bytes().count(b"\n") == 70_000
    assert path.read_bytes().endswith(lines_up_to(70_000)[-1])

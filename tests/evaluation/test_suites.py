"""Prompt suites: every format, what white space becomes of, and every way to be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdpo.common.errors import UserError
from sdpo.evaluation.generate import suites
from sdpo.evaluation.generate.suites import KNOWN_SUITES, Prompt, digest, read_suite

# Outer blanks, tab and newline, quotes, commas, a line separator of Unicode, beyond latin-1.
TEXTS = [" a cat ", "b,\t\nc", 'say "hi"', "l\u2028s", "Ångström 猫", "a\r\nb", " a cat "]
ONE_LINERS = [" a cat ", 'say "hi", now', "l\u2028s", "Ångström 猫"]


def written(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def texts(suite: suites.Suite) -> list[str]:
    return [prompt.text for prompt in suite.prompts]


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def table(delimiter: str, header: list[str], rows: list[list[str]], end: str = "\n") -> str:
    return "".join(delimiter.join(quoted(cell) for cell in row) + end for row in [header, *rows])


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "row",
    [
        lambda text: text,
        lambda text: {"prompt": text},
        lambda text: {"prompt": text, "gen_image_path": "", "raw_image_path": "", "metadata": {}},
    ],
)
def test_json_and_jsonl_keep_prompts_as_they_are(tmp_path, row, bom, ascii_only):
    rows = [row(text) for text in TEXTS]
    whole = json.dumps(rows, ensure_ascii=ascii_only).encode()
    lines = [json.dumps(r, ensure_ascii=ascii_only).encode() for r in rows]
    as_json = read_suite(written(tmp_path, "mine.json", bom + whole))
    as_lines = read_suite(written(tmp_path, "mine.JSONL", bom + b"\r\n\n".join(lines) + b"\n"))
    assert texts(as_json) == texts(as_lines) == TEXTS
    assert all(prompt.category is None for prompt in as_json.prompts + as_lines.prompts)
    assert as_json.name == as_lines.name == "mine"


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("column", ["prompt", "Prompt", "caption", "Caption"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_keep_prompts_as_they_are(tmp_path, suffix, delimiter, column, end):
    content = table(delimiter, ["id", column], [[str(i), t] for i, t in enumerate(TEXTS)], end)
    path = written(tmp_path, f"mine.{suffix}", "\ufeff" + content + end)
    assert texts(read_suite(path)) == TEXTS


def test_categories(tmp_path):
    rows = [
        {"prompt": "a", "category": "x"},
        {"prompt": "b", "Category": "y"},
        {"prompt": "c", "metadata": {"category": "z"}},
        {"prompt": "d", "category": None, "metadata": None},
        {"prompt": "e", "category": ""},
        "f",
    ]
    want = list(zip("abcdef", ["x", "y", "z", None, None, None], strict=True))
    whole = written(tmp_path, "a.json", json.dumps(rows))
    lines = written(tmp_path, "b.jsonl", "\n".join(map(json.dumps, rows)))
    cells = [[text, category or ""] for text, category in want]
    for path in (
        whole,
        lines,
        written(tmp_path, "c.csv", table(",", ["prompt", "category"], cells)),
        written(tmp_path, "d.tsv", table("\t", ["Prompt", "Category"], cells)),
    ):
        assert read_suite(path).prompts == [Prompt(*pair) for pair in want]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_txt_is_a_prompt_a_line(tmp_path, end):
    content = end.join(["", *ONE_LINERS, "  ", ONE_LINERS[0]])
    assert texts(read_suite(written(tmp_path, "p.txt", content))) == [*ONE_LINERS, ONE_LINERS[0]]


def test_a_name_is_fit_for_a_file_name(tmp_path):
    assert read_suite(written(tmp_path, "my prompts, v1.2.txt", "a")).name == "my_prompts_v1.2"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[]", "holds no prompt"),
        ("a.jsonl", "\n \n", "holds no prompt"),
        ("a.txt", "", "holds no prompt"),
        ("a.csv", "prompt,category\n", "holds no prompt"),
        ("a.csv", "", "no column prompt"),
        ("a.tsv", "text\tcategory\na\tb\n", "no column prompt.*found text, category"),
        ("a.json", '{"prompt": "a"}', "must be a JSON list of prompts, found an object"),
        ("a.json", '["a", ', "a.json: not JSON"),
        ("a.json", "[" * 100_000, "a.json: not JSON"),
        ("a.json", '["a", 3]', "row 1: the prompt must be text, found 3"),
        ("a.json", '["a", null]', "row 1: the prompt must be text, found nothing"),
        ("a.json", '["a", ["b"]]', "row 1: the prompt must be text, found a list"),
        ("a.json", '[{"prompt": {}}]', "row 0: the prompt must be text, found an object"),
        ("a.json", '["a", {"text": "b"}]', "row 1: the key prompt is missing"),
        ("a.json", '["a", " "]', "row 1: the prompt is blank"),
        ("a.json", '["a", "\\ud800"]', "row 1: .*not text"),
        ("a.json", '[{"prompt": "a", "category": 1}]', "row 0: the category must be text, found 1"),
        ("a.jsonl", '"a"\n\n{"prompt": 1}\n', "line 3: the prompt must be text, found 1"),
        ("a.jsonl", '"a"\nb\n', "line 2: not JSON"),
        ("a.csv", "prompt,category\n\na,b\n\nc, d,e\n", "line 5: more fields than columns"),
        ("a.csv", "category,prompt\na,b\nc\n", "line 3: the prompt must be text, found nothing"),
        ("a.csv", 'prompt\n"a" b\n', "the row from line 2 on: .*begins with a quote"),
        ("a.tsv", 'prompt\na\n"b\nc\n', "the row from line 3 on: .*begins with a quote"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
        ("a.parquet", "x", "must be one of .json, .jsonl, .csv, .tsv, .txt"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, content, said):
    path = written(tmp_path, name, content)
    with pytest.raises(UserError, match=said) as caught:
        read_suite(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no file of prompts .*gone\.json"):
        read_suite(str(tmp_path / "gone.json"))
    with pytest.raises(UserError, match="hpvs2; known suites are papv2, hpsv2, "):
        read_suite("hpvs2")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="there is no file"):
        read_suite(str(tmp_path / "folder.json"))


@pytest.mark.parametrize("name", suites.BUILT_SUITES)
def test_a_suite_not_built_says_how(tmp_path, monkeypatch, name):
    monkeypatch.setattr(suites, "PROMPTS_DIR", tmp_path)
    with pytest.raises(UserError, match=rf"python prompts/build\.py {name}`.*--source DIR"):
        read_suite(name)
    written(tmp_path, f"{name}.json", '["a"]')
    assert read_suite(name) == suites.Suite(name, [Prompt("a")])


def test_tinyworld_is_what_the_tiny_world_says():
    from sdpo.tinyworld.world import all_descriptions, evaluation_prompts

    objects = {d.text: len(d.objects) for d in all_descriptions()}
    categories = {1: "one object", 2: "two objects"}
    want = [Prompt(text, categories[objects[text]]) for text in evaluation_prompts(128)]
    suite = read_suite("tinyworld")
    assert suite == suites.Suite("tinyworld", want)
    assert len({prompt.text for prompt in want}) == 128
    assert [p.category for p in suite.prompts].count("one object") == 64
    assert suite.name in KNOWN_SUITES


def test_digest():
    want = hashlib.sha256(" a\n猫\n".encode()).hexdigest()
    assert digest([" a", "猫", ""]) == want
    assert digest(text for text in (" a", "猫", "")) == want
    assert digest(["猫", " a", ""]) != want


def test_suites_need_no_torch(repo):
    code = (
        "import sdpo.evaluation.generate.suites, sdpo.evaluation.generate.published, sys; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


def test_without_a_checkout(repo, tmp_path):
    """As a wheel lays it out: tinyworld in the package, the others in the user's cache."""
    installed, cache = tmp_path / "site-packages", tmp_path / "cache"
    shutil.copytree(
        repo / "sdpo", installed / "sdpo", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    tinyworld = repo / "prompts" / "tinyworld.json"
    shutil.copy(tinyworld, installed / "sdpo" / "evaluation" / "generate")
    (cache / "sdpo" / "prompts").mkdir(parents=True)
    (cache / "sdpo" / "prompts" / "papv2.json").write_text('["a"]')
    code = (
        "from sdpo.common.files import PROMPTS_DIR\n"
        "from sdpo.evaluation.generate.suites import read_suite\n"
        "print(PROMPTS_DIR, *(len(read_suite(n).prompts) for n in ('tinyworld', 'papv2')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(cache / "sdpo" / "prompts"), "128", "1"], done.stderr
    del environment["XDG_CACHE_HOME"]
    environment["HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from sdpo.common.files import PROMPTS_DIR as p; print(p)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / ".cache" / "sdpo" / "prompts"), done.stderr

"""prompts/build.py: from public sources, held on disk or behind a stand-in for the network, to the
published suites; and nothing written where they do not come out."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import URLError

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.common.errors import UserError
from sdpo.evaluation.generate import published as build
from sdpo.evaluation.generate import published_sources as sources
from sdpo.evaluation.generate.published import PUBLISHED, difference, ensure, is_built, parse_args
from sdpo.evaluation.generate.suites import BUILT_SUITES, Prompt, digest

IMAGE_BYTES = 2000


@pytest.fixture(scope="module")
def shared(repo) -> Path:
    """The published suites, and Parti's table."""
    path = repo.parent / "shared" / "prompts"
    if not path.is_dir():
        pytest.skip("the published suites are not on this machine")
    return path


@pytest.fixture(scope="module")
def published(shared) -> dict[str, list[str]]:
    """The published prompts."""
    lists = {n: json.loads((shared / f"{n}.json").read_text("utf-8")) for n in BUILT_SUITES}
    return {name: [row["prompt"] for row in rows] for name, rows in lists.items()}


def write_split(folder: Path, captions: list[str | None], parts: int = 2) -> None:
    """Parquet files like those of Pick-a-Pic: shuffled captions among images."""
    folder.mkdir(parents=True)
    captions = captions.copy()
    random.Random(0).shuffle(captions)
    for part in range(parts):
        own = captions[part::parts]
        images = [os.urandom(IMAGE_BYTES) for _ in own]
        rows = {"jpg_0": images, "caption": own, "jpg_1": images, "label_0": [0.5] * len(own)}
        name = f"test-{part:05}-of-{parts:05}-0123456789abcdef.parquet"
        pq.write_table(pa.table(rows), folder / name, row_group_size=400)


def write_styles(folder: Path, prompts: list[str]) -> None:
    """The four files of the HPDv2 benchmark."""
    folder.mkdir(parents=True)
    for i, style in enumerate(("anime", "concept-art", "paintings", "photo")):
        (folder / f"{style}.json").write_text(json.dumps(prompts[800 * i : 800 * (i + 1)]))


@pytest.fixture
def made_up(tmp_path, monkeypatch) -> list[str]:
    """Prompts that stand in for the published papv2, which is not on every machine."""
    prompts = [f"made up {i}, 猫" for i in range(487)]
    known = build.Published(487, digest(prompts), digest(sorted(prompts)))
    monkeypatch.setitem(PUBLISHED, "papv2", known)
    monkeypatch.setattr(sources, "PAPV2_ORDER", tmp_path / "order")
    (tmp_path / "order").write_text("".join(sources.pin(p) + "\n" for p in prompts))
    return prompts


def read(path: Path) -> tuple[list[str], list[str | None]]:
    rows = json.loads(path.read_text("utf-8"))
    return [row["prompt"] for row in rows], [row.get("category") for row in rows]


def refused(tmp_path: Path, name: str, **options) -> str:
    """Build, which must fail in one sentence and write nothing; returns the sentence."""
    out = tmp_path / "refused"
    with pytest.raises(UserError) as caught:
        ensure([name], outdir=out, **options)
    assert not [path for path in out.rglob("*") if path.name != build.LOCK_FILE]
    assert name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def noisy(prompts: list[str]) -> list[str | None]:
    """A split that holds these prompts: thrice, some with outer white space, among others."""
    extra = [f"something else {i}" for i in range(300)]
    return [*prompts[20:] * 3, *(f" {p}\n" for p in prompts[:20]), *extra, None]


def test_papv2_from_a_split(tmp_path, published):
    write_split(tmp_path / "in" / "hub" / "data", noisy(published["papv2"]))
    # Others' files of that name, and lists of prompts, may lie there too.
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in" / "test-mine.parquet")
    (tmp_path / "in" / "test_broken.parquet").write_bytes(b"PAR1")
    ensure(["papv2"], source=tmp_path / "in", outdir=tmp_path)
    texts, categories = read(tmp_path / "papv2.json")
    assert texts == published["papv2"]
    assert set(categories) == {None}


def test_hpsv2_from_the_benchmark(tmp_path, published):
    write_styles(tmp_path / "in" / "benchmark", published["hpsv2"])
    # A folder with only some of the four is none.
    (tmp_path / "in" / "anime.json").write_text('["a"]')
    ensure(["hpsv2"], source=str(tmp_path / "in"), outdir=tmp_path)
    texts, categories = read(tmp_path / "hpsv2.json")
    assert texts == published["hpsv2"]
    assert any(text != text.strip() for text in texts)
    assert [categories[i] for i in (0, 799, 800, 1600, 2399, 2400, 3199)] == [
        *("anime", "anime", "concept-art", "paintings", "paintings", "photo", "photo")
    ]


def test_partiprompts_from_the_table(tmp_path, shared, published):
    (tmp_path / "in").mkdir()
    table = (shared / "PartiPrompts.tsv").read_bytes()
    (tmp_path / "in" / "PartiPrompts.tsv").write_bytes(table)
    ensure(["partiprompts"], source=tmp_path / "in", outdir=tmp_path)
    texts, categories = read(tmp_path / "partiprompts.json")
    assert texts == published["partiprompts"]
    assert categories[0] == "Abstract" and len(set(categories)) == 12


def test_from_published_lists(tmp_path, shared, published):
    (tmp_path / "in").mkdir()
    for name in BUILT_SUITES:
        (tmp_path / "in" / f"{name}.json").write_bytes((shared / f"{name}.json").read_bytes())
    ensure(BUILT_SUITES, source=tmp_path / "in", outdir=tmp_path / "a")
    ensure(["hpsv2"], source=tmp_path / "a", outdir=tmp_path / "b")
    for name in BUILT_SUITES:
        assert read(tmp_path / "a" / f"{name}.json")[0] == published[name]
    assert len(set(read(tmp_path / "a" / "hpsv2.json")[1])) == 4
    assert read(tmp_path / "b" / "hpsv2.json") == read(tmp_path / "a" / "hpsv2.json")
    # With the table beside it, Parti's categories are known.
    ensure(["partiprompts"], source=shared, outdir=tmp_path / "c")
    assert set(read(tmp_path / "a" / "partiprompts.json")[1]) == {None}
    assert None not in read(tmp_path / "c" / "partiprompts.json")[1]


def test_a_bad_source_does_not_hide_a_good_one(tmp_path, published):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "PartiPrompts.tsv").write_text("Prompt\tCategory\na\tb\n")
    (tmp_path / "in" / "partiprompts.json").write_text(json.dumps(published["partiprompts"]))
    ensure(["partiprompts"], source=tmp_path / "in", outdir=tmp_path)
    assert read(tmp_path / "partiprompts.json")[0] == published["partiprompts"]


def test_changed_prompts_are_refused(tmp_path, shared, published):
    papv2 = published["papv2"]
    write_split(tmp_path / "a", noisy([*papv2[:400], papv2[400] + ".", *papv2[402:]]))
    said = refused(tmp_path, "papv2", source=tmp_path / "a")
    assert "2 of the 487 published prompts are not among" in said and "as a set" in said

    hpsv2 = published["hpsv2"]
    write_styles(tmp_path / "b", [hpsv2[0] + " ", *hpsv2[1:]])
    said = refused(tmp_path, "hpsv2", source=tmp_path / "b")
    assert "3200 prompts of sha256" in said and "compared as sets they are different" in said
    write_styles(tmp_path / "c", hpsv2[::-1])
    same = "compared as sets they are the same in another order"
    assert same in refused(tmp_path, "hpsv2", source=tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "hpsv2.json").write_text(json.dumps(list(dict.fromkeys(hpsv2))))
    said = refused(tmp_path, "hpsv2", source=tmp_path / "d")
    assert "3172 prompts" in said and "published are 3200" in said and same in said

    lines = (shared / "PartiPrompts.tsv").read_text("utf-8").split("\n")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "PartiPrompts.tsv").write_text("\n".join(lines[:-2]) + "\n")
    assert "1631 prompts" in refused(tmp_path, "partiprompts", source=tmp_path / "e")


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("papv2", {}, r"nothing in .* to build papv2 from; it takes data/test\*\.parquet of"),
        ("hpsv2", {"anime.json": "[]"}, "it takes benchmark/{anime,concept-art,paintings,photo}"),
        ("hpsv2", {"hpsv2.json": "["}, "hpsv2.json: not JSON"),
        ("papv2", {"test.parquet": "PAR1"}, "487 of the 487 .*test.parquet was passed over"),
        ("partiprompts", {"PartiPrompts.tsv": "a\tb\n"}, "no columns Prompt and Category"),
        ("partiprompts", {"PartiPrompts.tsv": b"Prompt\tCategory\n\xff\t"}, "cannot read .*utf-8"),
        ("partiprompts", {"x.tsv": ""}, "it takes https://raw.*or a list partiprompts.json"),
    ],
)
def test_a_source_without_the_files(tmp_path, name, files, said):
    source = tmp_path / "in"
    source.mkdir()
    for file, content in files.items():
        (source / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused(tmp_path, name, source=source)
    assert re.search(said, sentence), sentence


def test_a_source_that_is_no_directory(tmp_path):
    with pytest.raises(UserError, match="--prompt_source: there is no directory gone"):
        ensure(["papv2"], source="gone", outdir=tmp_path, source_flag="--prompt_source")


def no_network(url):
    raise URLError(f"no network for {url}")


@pytest.mark.parametrize("name", BUILT_SUITES)
def test_the_official_repository_is_the_last_source(tmp_path, shared, published, monkeypatch, name):
    answers = {}

    def answer(url, timeout):
        return io.BytesIO(answers[url]) if url in answers else no_network(url)

    monkeypatch.setattr(sources, "urlopen", answer)
    official = sources.OFFICIAL_URL.format(name)
    assert sources.on_the_network(name, None)[-1].where == official
    cache = {"cache_dir": str(tmp_path / "cache")}
    answers[official] = json.dumps(published[name][::-1]).encode()
    assert f"{name} is not written" in refused(tmp_path, name, **cache)
    answers[official] = (shared / f"{name}.json").read_bytes()
    ensure([name], outdir=tmp_path, **cache)
    texts, categories = read(tmp_path / f"{name}.json")
    assert texts == published[name]
    assert name != "hpsv2" or categories[800] == "concept-art"


def test_no_hub(tmp_path, monkeypatch):
    """The tests' environment is off line."""
    monkeypatch.setattr(sources, "urlopen", lambda url, timeout: no_network(url))
    for name, repos in (("papv2", sources.PAPV2_REPOS), ("hpsv2", sources.HPSV2_REPOS)):
        said = refused(tmp_path, name, cache_dir=str(tmp_path / "cache"))
        assert all(repo in said for repo in repos)
        assert sources.OFFICIAL_URL.format(name) in said
        assert "cannot read" in said and "elsewhere and give --source DIR" in said


def test_no_url(tmp_path, monkeypatch):
    def fail(url, timeout):
        assert timeout > 0
        raise URLError("timed out")

    monkeypatch.setattr(sources, "urlopen", fail)
    said = refused(tmp_path, "partiprompts", source_flag="--prompt_source")
    assert sources.PARTI_URL in said and "timed out" in said
    assert said.endswith("give --prompt_source DIR")


def test_partiprompts_from_the_url(tmp_path, shared, published, monkeypatch):
    table = (shared / "PartiPrompts.tsv").read_bytes()
    answers = {sources.PARTI_URL: table[: len(table) // 2]}
    monkeypatch.setattr(sources, "urlopen", lambda url, timeout: io.BytesIO(answers[url]))
    # A download that breaks off leaves nothing behind.
    assert "partiprompts is not written" in refused(tmp_path, "partiprompts")
    answers[sources.PARTI_URL] = table
    ensure(["partiprompts"], outdir=tmp_path)
    assert read(tmp_path / "partiprompts.json")[0] == published["partiprompts"]


def test_hpsv2_from_the_hub_and_its_second_home(tmp_path, published):
    """What a cache holds is taken without a network, as the hub's client does."""
    repo = tmp_path / "cache" / f"datasets--{sources.HPSV2_REPOS[1].replace('/', '--')}"
    write_styles(repo / "snapshots" / "abc" / "benchmark", published["hpsv2"])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    ensure(["hpsv2"], outdir=tmp_path, cache_dir=str(tmp_path / "cache"))
    assert read(tmp_path / "hpsv2.json")[0] == published["hpsv2"]


class Hub:
    """A stand-in for HfFileSystem over a directory, which counts the bytes that are read."""

    root: Path
    read = 0

    def glob(self, pattern: str) -> list[str]:
        return [str(path) for path in self.root.glob(pattern)]

    def open(self, path: str, mode: str, cache_type: str) -> io.FileIO:
        assert (mode, cache_type) == ("rb", "none")

        class Counting(io.FileIO):
            def read(self, size: int = -1) -> bytes:
                data = super().read(size)
                Hub.read += len(data)
                return data

        return Counting(path)


@pytest.mark.parametrize("home", sources.PAPV2_REPOS)
def test_only_captions_are_read_from_the_hub(tmp_path, made_up, monkeypatch, home):
    folder = tmp_path / "datasets" / home / "data"
    write_split(folder, noisy(made_up))
    monkeypatch.setattr("huggingface_hub.HfFileSystem", Hub)
    monkeypatch.setattr(Hub, "root", tmp_path, raising=False)
    monkeypatch.setattr(Hub, "read", 0)
    ensure(["papv2"], outdir=tmp_path)
    assert read(tmp_path / "papv2.json")[0] == made_up
    captions, footers, images = 0, 0, 0
    for path in folder.iterdir():
        about = pq.ParquetFile(path).metadata
        for group in map(about.row_group, range(about.num_row_groups)):
            captions += group.column(1).total_compressed_size
            images += group.column(0).total_compressed_size
        footers += max(about.serialized_size, 64 * 1024)
    assert 0 < Hub.read <= captions + footers + 1024
    assert images > 5 * Hub.read


def test_what_is_there_is_left_alone_if_it_is_right(tmp_path, made_up, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    (source / "papv2.json").write_text(json.dumps(made_up))
    ensure(["papv2"], source=source, outdir=tmp_path)
    path = tmp_path / "papv2.json"
    before = path.stat()
    assert is_built("papv2", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(build, "build", lambda *args: pytest.fail("nothing is to be built"))
        ensure(["papv2", "tinyworld", "some/file.txt"], outdir=tmp_path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns

    path.write_text(json.dumps(made_up[1:]))
    wrong = path.read_bytes()
    with pytest.raises(UserError, match=r"486 prompts .*build\.py papv2 --force"):
        ensure(["papv2"], source=source, outdir=tmp_path)
    assert path.read_bytes() == wrong
    path.write_text("[")
    with pytest.raises(UserError, match=r"not JSON.*--force"):
        ensure(["papv2"], source=source, outdir=tmp_path)
    # Forced from a source that is wrong too: the old file stays.
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing in"):
        ensure(["papv2"], source=tmp_path / "empty", outdir=tmp_path, force=True)
    assert path.read_text() == "["
    ensure(["papv2"], source=source, outdir=tmp_path, force=True)
    assert read(path)[0] == made_up


def test_processes_at_once_build_once(tmp_path, made_up, monkeypatch):
    calls = []

    def slowly(name, *args):
        calls.append(name)
        time.sleep(0.3)
        return [Prompt(text) for text in made_up]

    monkeypatch.setattr(build, "build", slowly)
    threads = [
        threading.Thread(target=ensure, args=(["papv2"],), kwargs={"outdir": tmp_path})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["papv2"]
    assert is_built("papv2", tmp_path)


def test_an_outdir_that_cannot_be(tmp_path, shared):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write prompts to .*file"):
        ensure(["papv2"], source=shared, outdir=tmp_path / "file")


def test_the_pinned_order(published):
    order = sources.PAPV2_ORDER.read_text().splitlines()
    assert order == [sources.pin(prompt) for prompt in published["papv2"]]


def test_constants_are_the_published_suites(published):
    assert set(PUBLISHED) == set(BUILT_SUITES)
    for name, texts in published.items():
        known = PUBLISHED[name]
        assert (known.count, known.sha256) == (len(texts), digest(texts))
        assert known.set_sha256 == digest(sorted(set(texts)))
        assert difference(name, [Prompt(text) for text in texts]) is None


def test_suite_names():
    assert parse_args([]).suites == ("papv2", "hpsv2", "partiprompts")
    with pytest.raises(UserError, match="tinyworld is not built here"):
        parse_args(["tinyworld"])


def test_as_a_program(repo, tmp_path, shared):
    def run(*flags):
        command = [sys.executable, repo / "prompts" / "build.py", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("papv2", "partiprompts", "--source", shared, "--outdir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "487 prompts" in done.stdout and "1632 prompts" in done.stdout
    assert is_built("partiprompts", tmp_path / "out")
    failed = run("hpsv2", "--source", tmp_path / "out", "--outdir", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr.startswith("build.py: error: --source: nothing in")
    assert "Traceback" not in failed.stderr

"""compare.py as a program: what it pairs, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scored import make_model

from sdpo.common.errors import run_main
from sdpo.evaluation.generate.manifest import read_manifest
from sdpo.evaluation.score.table import json_path, parquet_path, read_scores

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def compare(monkeypatch, capsys):
    """`compare(*argv)`: the program run here; its exit code, stdout and stderr."""
    monkeypatch.syspath_prepend(str(REPO))
    from sdpo.evaluation.compare import run as program

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_main(program.main, "compare.py")
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(compare, tmp_path):
    """`refused(*argv)`: the sentence it ends with; nothing may have been written."""

    def run(*argv: object) -> str:
        code, out, err = compare(*argv, "--outdir", tmp_path / "refused")
        assert (code, out) == (2, "")
        assert err.startswith("compare.py: error: ") and err.count("\n") == 1, err
        assert not list(tmp_path.glob("refused/*"))
        return err

    return run


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Duplicate prompts, leftovers on both sides, a tie, categories, two metrics."""
    a = make_model(
        tmp_path / "a",
        ["cat", "dog", "cat", "only a", "fox"],
        {"clip": [0.5, 0.2, 0.9, 0.1, 0.3], "oracle": [1, 0, 1, 1, 0]},
        ["pets", "pets", "pets", "rest", "rest"],
    )
    b = make_model(
        tmp_path / "b",
        ["fox", "cat", "cat", "only b", "dog", "cat"],
        {"clip": [0.3, 0.6, 0.1, 0.2, 0.1, 0.7], "oracle": [1, 0, 0, 0, 1, 1]},
        ["rest", "pets", "pets", "rest", "pets", "pets"],
    )
    return a, b


def test_files_of_two_models(two, tmp_path, compare):
    out = tmp_path / "out"
    code, printed, _ = compare("--json_a", two[0], "--json_b", two[1], "--label_a", "ours",
                               "--label_b", "base", "--outdir", out)  # fmt: skip
    assert code == 0
    names = {"pair_clip.json", "pair_oracle.json", "summary.json", "summary.csv", "summary.md"}
    assert {p.name for p in out.iterdir()} == names | {"report.html"}

    pairs = load(out / "pair_clip.json")
    assert {k: pairs[k] for k in pairs if k != "results"} == {
        "model_a": "ours",
        "model_b": "base",
        "total_pairs": 4,
        "wins_a": 2,
        "wins_b": 1,
        "ties": 1,
        "win_rate_a_over_b": 0.625,
        "mean_score_a": pytest.approx(0.475),
        "mean_score_b": pytest.approx(0.275),
        "ties_policy": "half",
    }
    seen = [(r["prompt"], r["score_a"], r["score_b"], r["winner"]) for r in pairs["results"]]
    assert seen == [
        ("cat", 0.5, 0.6, "base"),
        ("dog", 0.2, 0.1, "ours"),
        ("cat", 0.9, 0.1, "ours"),
        ("fox", 0.3, 0.3, "tie"),
    ]
    first = pairs["results"][0]
    assert (out / first["image_a"]).resolve() == (two[0].with_suffix("") / "0_8x8.png").resolve()
    assert (out / first["image_b"]).resolve() == (two[1].with_suffix("") / "1_8x8.png").resolve()
    assert (first["pair_index"], first["row_a"], first["row_b"]) == (0, 0, 1)
    assert (first["diff"], first["category"]) == (pytest.approx(-0.1), "pets")

    summary = load(out / "summary.json")
    assert summary["pair"] == {"model_a": "ours", "model_b": "base", "ties_policy": "half"}
    clip, oracle = summary["metrics"]
    assert (clip["metric"], clip["name"], oracle["name"]) == ("Clip", "clip", "oracle")
    for key in ("wins_a", "wins_b", "ties", "total_pairs", "win_rate_a_over_b"):
        assert clip[key] == pairs[key]
    assert clip["mean_a"] == pairs["mean_score_a"]
    assert clip["mean_diff"] == pytest.approx(0.2)
    assert clip["ci95_low"] <= 0.625 <= clip["ci95_high"]
    assert clip["mean_diff_ci95_low"] <= 0.2 <= clip["mean_diff_ci95_high"]
    assert clip["sign_test_p"] == 1.0
    assert (oracle["wins_a"], oracle["wins_b"], oracle["win_rate_a_over_b"]) == (2, 2, 0.5)
    assert summary["averages"] == {
        "macro_win_rate_a_over_b": pytest.approx((0.625 + 0.5) / 2),
        "micro_win_rate_a_over_b": pytest.approx((0.625 + 0.5) / 2),
    }
    assert summary["unmatched_a"] == [{"row": 3, "prompt": "only a"}]
    assert [row["prompt"] for row in summary["unmatched_b"]] == ["only b", "cat"]
    assert {k: (v["total_pairs"], v["wins_a"]) for k, v in clip["categories"].items()} == {
        "pets": (3, 2),
        "rest": (1, 0),
    }
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert [(r["name"], r["category"], r["wins_a"]) for r in rows] == [
        ("clip", "", "2"),
        ("clip", "pets", "2"),
        ("clip", "rest", "0"),
        ("oracle", "", "2"),
        ("oracle", "pets", "2"),
        ("oracle", "rest", "0"),
    ]
    for text in (printed, (out / "summary.md").read_text()):
        assert "A = ours, B = base; a tie counts as half a win" in text
        assert "62.5% [" in text and "2/1/1" in text
        assert "1 of 5 images of ours have no partner in base and are left out: 'only a'" in text
        assert "2 of 6 images of base" in text


def test_ties_as_losses(two, tmp_path, compare):
    compare("--json_a", two[0], "--json_b", two[1], "--outdir", tmp_path / "out", "--ties", "loss")
    pairs = load(tmp_path / "out/pair_clip.json")
    assert (pairs["win_rate_a_over_b"], pairs["ties_policy"]) == (0.5, "loss_for_a")
    assert (pairs["wins_a"], pairs["ties"]) == (2, 1)


def test_by_index(tmp_path, compare, refused):
    a = make_model(tmp_path / "a", ["x", "y"], {"clip": [1, 2]})
    b = make_model(tmp_path / "b", ["x", "why"], {"clip": [3, 1]})
    c = make_model(tmp_path / "c", ["other"], {"clip": [1]})
    code, printed, _ = compare("--json_a", a, "--json_b", b, "--align", "index", "--outdir",
                               tmp_path / "out")  # fmt: skip
    assert code == 0 and "1 of 2 pairs by index have different prompts" in printed
    pairs = load(tmp_path / "out/pair_clip.json")["results"]
    assert [p.get("prompt_b") for p in pairs] == [None, "why"]
    summary = load(tmp_path / "out/summary.json")
    assert summary["align"] == "index"
    expected = [{"pair_index": 1, "prompt_a": "y", "prompt_b": "why"}]
    assert summary["differing_prompts"] == expected
    assert "equal length" in refused("--json_a", a, "--json_b", c, "--align", "index")
    assert "--align index" in refused("--json_a", a, "--json_b", c)


def test_the_same_bytes_again_and_another_seed_another_interval(two, tmp_path, compare):
    def run(name: str, *more: object) -> bytes:
        compare("--json_a", two[0], "--json_b", two[1], "--outdir", tmp_path / name, *more)
        return (tmp_path / name / "summary.json").read_bytes()

    assert run("out") == run("again")
    assert run("other", "--seed", 1) != run("out")
    pages = [(tmp_path / name / "report.html").read_bytes() for name in ("out", "again")]
    assert pages[0] == pages[1]


def test_a_moved_folder_is_compared_as_before(two, tmp_path, compare):
    compare("--json_a", two[0], "--json_b", two[1], "--outdir", tmp_path / "out")
    before = load(tmp_path / "out/summary.json")
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / two[0].name
    compare("--json_a", moved, "--json_b", two[1], "--outdir", tmp_path / "out2")
    assert load(tmp_path / "out2/summary.json")["metrics"] == before["metrics"]
    first = load(tmp_path / "out2/pair_clip.json")["results"][0]
    assert (tmp_path / "out2" / first["image_a"]).is_file()


def test_manifest_score_file_or_image_folder_and_default_names(two, tmp_path, compare, monkeypatch):
    """Suites of one name are told apart by their folders, which are named after the models."""
    monkeypatch.chdir(tmp_path)
    ways_a = two[0], parquet_path(two[0]), json_path(two[0]), two[0].with_suffix(""), two[0].parent
    found = []
    for way in ways_a:
        code, _, err = compare("--json_a", way, "--json_b", two[1])
        assert code == 0, err
        found.append(load(Path("output/compare/a_vs_b/summary.json")))
        shutil.rmtree("output")
    assert all(one == found[0] for one in found)
    other = make_model(tmp_path / "a2", ["cat"], {"clip": [1]}, stem="other")
    compare("--json_a", two[0], "--json_b", other)
    assert Path(f"output/compare/{two[0].stem}_vs_other").is_dir()


def test_three_models(two, tmp_path, compare):
    c = make_model(tmp_path / "c", ["dog", "cat"], {"clip": [0.1, 0.5], "oracle": [0, 1]})
    out = tmp_path / "out"
    code, printed, _ = compare("--json", f"ours={two[0]}", f"base={two[1]}", "--json", f"c/d={c}",
                               "--outdir", out, "--ties", "loss")  # fmt: skip
    assert code == 0 and "row over column" in printed
    folders = {p.name for p in out.iterdir() if p.is_dir()}
    assert folders == {"ours_vs_base", "ours_vs_c_d", "base_vs_c_d"}
    matrix = load(out / "matrix_clip.json")
    assert matrix["models"] == ["ours", "base", "c/d"]
    # ours against c: dog 0.2 to 0.1, and the first cat 0.5 to 0.5, a tie and so lost by both.
    assert matrix["win_rate"] == [[None, 0.5, 0.5], [0.25, None, 0.5], [0.0, 0.0, None]]
    assert matrix["total_pairs"][0] == [None, 4, 2] and matrix["ties"][2] == [1, 1, None]
    assert matrix["ci95_low"][1][0] <= 0.25 <= matrix["ci95_high"][1][0]
    summary = load(out / "summary.json")
    assert summary["matrices"][0] == matrix
    assert list(summary["models"]) == ["ours", "base", "c/d"]
    for name in folders:
        assert load(out / name / "summary.json") == summary["pairs"][name]
        pair = load(out / name / "pair_oracle.json")["results"][0]
        assert (out / name / pair["image_b"]).is_file()
    assert "## ours vs c/d" in (out / "summary.md").read_text()


def test_only_what_every_model_has_is_compared(tmp_path, compare):
    nan = float("nan")
    scores = {"clip": [1, 2], "oracle": [1, 1], "aesthetics": [1, nan]}
    a = make_model(tmp_path / "a", ["x", "y"], scores)
    b = make_model(tmp_path / "b", ["x", "y"], {"aesthetics": [1, 2], "clip": [0, 0]})
    code, _, err = compare("--json_a", a, "--json_b", b, "--outdir", tmp_path / "out")
    assert code == 0
    assert [m["name"] for m in load(tmp_path / "out/summary.json")["metrics"]] == ["clip"]
    assert "left out" in err and "aesthetics, oracle" in err


def test_metrics_come_in_the_published_order(tmp_path, compare):
    names = ["oracle", "imagereward", "clip", "pickscore"]
    scores = {name: [0.0] for name in names}
    a = make_model(tmp_path / "a", ["x"], scores)
    b = make_model(tmp_path / "b", ["x"], dict(reversed(scores.items())))
    compare("--json_a", a, "--json_b", b, "--outdir", tmp_path / "out")
    found = [m["name"] for m in load(tmp_path / "out/summary.json")["metrics"]]
    assert found == ["pickscore", "clip", "imagereward", "oracle"]


def test_what_is_missing_is_scored_first_and_kept(tmp_path, compare):
    """Half of one manifest is scored; the oracle, which needs no weights, does the rest."""
    caption = "a red circle at the center on a white background"
    nan = float("nan")
    a = make_model(tmp_path / "a", [caption, caption], {"oracle": [0.25, nan], "clip": [1, 1]})
    b = make_model(tmp_path / "b", [caption, caption], {"clip": [0, 2]})
    for path in (a, b):
        table = read_scores(read_manifest(path))
        if "oracle" in table.about:  # as the oracle itself would have noted it
            table.about["oracle"].update(weights={}, precision="no")
            table.save()
    argv = ["--json_a", a, "--json_b", b, "--outdir", tmp_path / "out", "--device", "cpu"]
    code, _, err = compare(*argv, "--scorers", "oracle", "clip")
    assert code == 0, err
    pairs = load(tmp_path / "out/pair_oracle.json")["results"]
    assert pairs[0]["score_a"] == 0.25 and np.isfinite(pairs[1]["score_a"])
    assert load(tmp_path / "out/pair_clip.json")["wins_a"] == 1
    assert "how well an image follows its caption" in (tmp_path / "out/report.html").read_text()
    for path in (a, b):
        assert "oracle" in read_scores(read_manifest(path)).complete()


def test_scores_made_by_different_weights_are_not_passed_over(two, tmp_path, compare):
    table = read_scores(read_manifest(two[1]))
    table.about["clip"]["weights"] = {"model": ["y"]}
    table.save()
    _, _, err = compare("--json_a", two[0], "--json_b", two[1], "--outdir", tmp_path / "out")
    assert "note: Clip has scored a and b with different weights" in err
    (note,) = load(tmp_path / "out/summary.json")["notes"]
    assert note in (tmp_path / "out/summary.md").read_text()


def test_the_script_needs_no_torch_where_everything_is_scored(two, tmp_path):
    """As a user runs it, from the script; a torch that breaks on import must not matter."""
    broken = tmp_path / "broken/torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('torch is not needed here')")
    environment = {"PATH": "/usr/bin:/bin", "SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1",
                   "PYTHONPATH": str(broken.parent), "HOME": str(tmp_path)}  # fmt: skip
    argv = ["--json_a", two[0], "--json_b", two[1], "--label_a", "a", "--label_b", "b"]
    done = subprocess.run(
        ["bash", "scripts/eval/test_vs.sh", *map(str, argv), "--outdir", str(tmp_path / "out")],
        cwd=REPO, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/report.html").is_file()
    assert "wrote" in done.stdout


def test_refusals_of_flags(two, refused, tmp_path):
    a, b = two
    assert "give --json_a and --json_b" in refused()
    assert "give --json_a and --json_b" in refused("--json_a", a)
    assert "give either --json or" in refused("--json", f"x={a}", "--json_b", b)
    assert "at least two models" in refused("--json", f"x={a}")
    assert "must be NAME=PATH, got" in refused("--json", a, b)
    both = ["--json_a", a, "--json_b", b]
    assert "names that differ" in refused(*both, "--label_a", "x", "--label_b", "x")
    assert "'tie'" in refused(*both, "--label_a", "tie")
    assert "names that differ" in refused("--json", f"x={a}", f"x={b}")
    assert "there is no scorer 'nonsense'" in refused(*both, "--scorers", "nonsense")
    assert "--weights" in refused(*both, "--weights", "clip")
    assert "invalid choice: 'win'" in refused(*both, "--ties", "win")
    assert "--seed" in refused(*both, "--seed", "-1")
    assert "at least 1, got 0" in refused(*both, "--batch_size", "0")
    assert "--json_a nowhere.json: there is no manifest" in refused(
        "--json_a", "nowhere.json", "--json_b", b
    )
    nothing = refused("--json_a", a, "--json_b", tmp_path)
    assert f"--json_b {tmp_path}: the folder holds no manifest of images" in nothing
    make_model(a.parent, ["cat"], {"clip": [1]}, stem="other")
    several = refused("--json_a", a.parent, "--json_b", b)
    assert str(a) in several
    assert str(a.with_name("other.json")) in several


def test_refusals_of_the_output_directory(two, tmp_path, compare):
    (tmp_path / "file").write_text("")
    for outdir in ("file", "file/below"):
        argv = ["--json_a", two[0], "--json_b", two[1], "--outdir", tmp_path / outdir]
        code, _, err = compare(*argv)
        assert code == 2 and "--outdir" in err


def test_refusals_of_manifests(two, refused, tmp_path):
    rows = load(two[0])
    broken = tmp_path / "a/broken.json"

    def sentence() -> str:
        broken.write_text(json.dumps(rows))
        return refused("--json_a", broken, "--json_b", two[1])

    del rows[1]["prompt"]
    assert "broken.json, row 1: the key prompt is missing" in sentence()
    rows[1]["prompt"] = "dog"
    rows[2]["gen_image_path"] = "gone.png"
    assert "broken.json, row 2: there is no image" in sentence()
    rows.clear()
    assert "is not a manifest" in sentence()
    broken.write_text("[{]")
    assert "cannot read the manifest" in refused("--json_a", broken, "--json_b", two[1])


def test_refusals_of_scores(two, refused):
    table = read_scores(read_manifest(two[1]))
    table.put("clip", np.array([2]), np.array([np.inf]))
    table.save()
    sentence = refused("--json_a", two[0], "--json_b", two[1])
    assert f"{two[1]}, row 2: its clip score is not a finite number" in sentence
    parquet_path(two[1]).write_bytes(b"PAR1 or not")
    assert "is not a score file" in refused("--json_a", two[0], "--json_b", two[1])


def with_settings(path: Path, **settings: object) -> Path:
    """A manifest whose rows say how their images were made."""
    rows = load(path)
    for index, row in enumerate(rows):
        row["metadata"] |= {"index": index, **settings}
        if settings.get("protocol") == "diffusers":
            row["metadata"]["seed"] += index
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


MADE = {"protocol": "paper", "steps": 50, "cfg": 7.5, "seed": 0, "height": 512, "width": 512}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"steps": 20}, "steps 50 and 20"),
        ({"cfg": 5.0}, "cfg 7.5 and 5.0"),
        ({"seed": 1}, "seed 0 and 1"),
        ({"height": 1024, "width": 1024}, "height 512 and 1024, width 512 and 1024"),
        ({"protocol": "diffusers"}, "protocol paper and diffusers"),
        ({"steps": 20, "seed": 3}, "steps 50 and 20, seed 0 and 3"),
    ],
)
def test_images_made_with_other_settings_are_noted(two, tmp_path, compare, other, said):
    a, b = with_settings(two[0], **MADE), with_settings(two[1], **{**MADE, **other})
    out = tmp_path / "out"
    code, _, err = compare("--json_a", a, "--json_b", b, "--label_a", "x", "--label_b", "y",
                           "--outdir", out)  # fmt: skip
    note = f"the images of x and y were made with different settings: {said}; generate them alike"
    assert code == 0
    assert note in err
    assert note in load(out / "summary.json")["notes"]
    assert note in (out / "summary.md").read_text(encoding="utf-8")
    assert note in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("protocol", ["paper", "diffusers"])
def test_images_made_alike_are_not_noted(two, tmp_path, compare, protocol):
    made = {**MADE, "protocol": protocol}
    a, b = with_settings(two[0], **made), with_settings(two[1], **made)
    code, _, err = compare("--json_a", a, "--json_b", b, "--label_a", "x", "--label_b", "y",
                           "--outdir", tmp_path / "out")  # fmt: skip
    assert (code, err) == (0, "")


def test_manifests_that_do_not_say_how_are_not_noted(two, tmp_path, compare):
    a = with_settings(two[0], **MADE)
    code, _, err = compare("--json_a", a, "--json_b", two[1], "--outdir", tmp_path / "out")
    assert (code, err) == (0, "")

"""`python -m sdpo.lab sweep` on micro runs: killed in the midst of one, and gone on with."""

from __future__ import annotations

import json
import time

import psutil
import pytest
import yaml
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.lab.sweep.results import curves, read_results

from .harness import Forked, Run, files, identical, run_here

PROGRAM = "sdpo/lab/__main__.py"
FLAGS = {
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
    "learning_rate": 1e-3,
}
VARIANTS = {
    "none": {},
    "pair": {"use_winner_preserving": True, "winner_preserving_scope": "pair"},
}


@pytest.fixture(scope="module")
def content(train):
    """A sweep of two runs that asks for everything."""
    argv = train.argv("unused")
    shared = dict(zip([a[2:] for a in argv[::2]], argv[1::2], strict=True)) | FLAGS
    del shared["output_dir"]
    return {
        "name": "micro",
        "flags": shared,
        "variants": VARIANTS,
        "seeds": [3],
        "heldout": {"split": "heldout", "max_pairs": 5, "timesteps": 2},
        "images": {
            "suites": "tinyworld",
            "scorers": "oracle",
            "limit": 3,
            "steps": 2,
            "protocol": "diffusers",
            "dtype": "fp32",
            "checkpoints": "all",
        },
    }


@pytest.fixture(scope="module")
def sweep(content, tmp_path_factory):
    """Runs a sweep here, in its directory; what is given replaces keys of the file."""
    directory = tmp_path_factory.mktemp("sweep")

    def run(*arguments, **keys):
        path = directory / "micro.yaml"
        path.write_text(yaml.safe_dump(content | keys, sort_keys=False))
        return run_here(PROGRAM, ["sweep", path, "--out", directory / "out", *arguments])

    run.out, run.file = directory / "out", directory / "micro.yaml"
    return run


@pytest.fixture(scope="module")
def swept(sweep, content):
    """The directory of a sweep that was killed, with the training under way, and then finished."""
    sweep.file.write_text(yaml.safe_dump(content, sort_keys=False))
    argv = ["sweep", sweep.file, "--out", sweep.out, "--jobs", 1]
    fork = Forked(argv, sweep.file.with_suffix(".stderr"), name=PROGRAM)
    log = sweep.out / "runs" / "none_seed-3" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.is_file() and '"step": 3,' in log.read_text()):
        assert fork.process.is_alive(), fork.stderr
        assert time.monotonic() < deadline, fork.stderr
        time.sleep(0.005)
    children = psutil.Process(fork.process.pid).children(recursive=True)
    fork.kill()
    for child in children:
        child.kill()
    assert fork.wait() != 0
    assert not (sweep.out / "results.parquet").exists()
    assert sweep() == 0
    return sweep.out


def summary(directory):
    return json.loads((directory / "summary.json").read_text())["rows"]


def heldout(directory):
    return [json.loads(line) for line in (directory / "heldout.jsonl").read_text().splitlines()]


def test_runs_are_those_of_train_py(swept, train, tmp_path):
    for name, flags in VARIANTS.items():
        found = Run(swept / "runs" / f"{name}_seed-3")
        alone = train(tmp_path / name, **FLAGS, **flags, seed=3)
        assert found.numbers == alone.numbers
        assert identical(found.unet(), alone.unet())
        assert found.checkpoints == [6]


def test_the_runs_share_the_references_errors(swept):
    (cache,) = (swept / "reference-cache").iterdir()
    assert json.loads((cache / "key.json").read_text())["key"]["seed"] == 3
    kept = sum(file.stat().st_size for file in cache.glob("errors-*.bin")) // 20
    # Each of two runs has six steps of two pairs, and one was killed on its way.
    assert 6 * 2 <= kept <= 2 * 6 * 2
    for name in VARIANTS:
        args = Run(swept / "runs" / f"{name}_seed-3").config["args"]
        assert args["cache_reference"] == str(cache)


def test_table_holds_what_the_programs_wrote(swept):
    table = read_results(swept / "results.parquet")
    assert table.column_names[:5] == [
        *("run", "variant", "seed", "use_winner_preserving", "winner_preserving_scope"),
    ]
    for name in VARIANTS:
        directory = swept / "runs" / f"{name}_seed-3"
        for kind, entries in (("train", Run(directory).metrics), ("heldout", heldout(directory))):
            for metric in ("winner_drift", "loser_drift", "margin", "implicit_acc"):
                found = curves(table, kind, metric, ("variant",))[name]
                assert found.steps.tolist() == [entry["step"] for entry in entries]
                assert found.values.tolist() == [[entry[metric] for entry in entries]]
        scores = curves(table, "score", "oracle", ("variant",))[name]
        images = swept / "images"
        assert scores.steps.tolist() == [0, 6]
        assert scores.values.tolist() == [
            [
                summary(directory)[0]["mean"]
                for directory in (images / "base", images / f"{name}_seed-3" / "checkpoint-6")
            ]
        ]


def test_images_are_of_the_checkpoints_and_of_one_base(swept):
    manifests = {
        path.parent.relative_to(swept / "images").as_posix(): json.loads(path.read_text())
        for path in (swept / "images").rglob("tinyworld_*_diffusers.json")
    }
    assert set(manifests) == {"base", *(f"{name}_seed-3/checkpoint-6" for name in VARIANTS)}
    assert len({m[0]["metadata"]["unet_sha256"] for m in manifests.values()}) == 3
    assert len({json.dumps([(r["prompt"], r["metadata"]["seed"]) for r in m])
                for m in manifests.values()}) == 1  # fmt: skip
    assert all(r["metadata"]["height"] == 32 for m in manifests.values() for r in m)


def test_figures_and_logs(swept):
    names = {path.name for path in (swept / "figures").iterdir()}
    assert names == {"scale.png", "drift.png", "horizon.png", "strips.png"}
    for name in names:
        with Image.open(swept / "figures" / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    logs = {path.name: path.read_text() for path in (swept / "logs").iterdir()}
    assert set(logs) == {"base.log", *(f"{name}_seed-3.log" for name in VARIANTS)}
    assert "checkpoint-6/summary.json" in logs["pair_seed-3.log"]


def kept(out):
    """All files but the table and the figures, which are made anew."""
    return {n: b for n, b in files(out).items() if n[:7] not in ("results", "figures")}


def test_the_same_command_again_runs_nothing(swept, sweep, capsys):
    before, table = kept(swept), read_results(swept / "results.parquet")
    assert sweep() == 0
    head, *rows, wrote = capsys.readouterr().out.splitlines()
    assert head.startswith("mean over seeds  runs  winner drift, %") and wrote.startswith("wrote ")
    assert [row.split()[:2] for row in rows] == [[name, "1"] for name in VARIANTS]
    assert kept(swept) == before
    assert read_results(swept / "results.parquet").to_pylist() != []
    assert read_results(swept / "results.parquet").equals(table)


def test_more_seeds_need_only_their_own_runs(swept, sweep, capsys):
    before = kept(swept)
    assert sweep("--dry_run", seeds=[3, 4]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line for line in lines if line.endswith(": done")} == {
        *(f"# {name}_seed-3, {stage}: done"
          for name in VARIANTS for stage in ("training", "held-out", "images")),
        "# base, images: done",
    }  # fmt: skip
    assert sum("train.py" in line for line in lines) == 2
    assert kept(swept) == before


def test_other_held_out_pairs_are_measured_anew(swept, sweep, capsys):
    assert sweep("--dry_run", heldout={"split": "heldout", "max_pairs": 4, "timesteps": 2}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("sdpo.evaluation.heldout" in line for line in lines) == 2
    assert not any("train.py" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"flags": {"beta_dpo": 7}}, r"--out: .*none_seed-3 holds a run with --beta_dpo 5000"),
        ({"images": {"limit": 2}}, r"--out: .*images holds images with --limit 3"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(swept, sweep, content, change, sentence):
    before = files(swept)
    ((key, more),) = change.items()
    with pytest.raises(UserError, match=sentence):
        sweep(**{key: content[key] | more})
    assert files(swept) == before

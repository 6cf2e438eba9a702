"""--choice_model and scripts/data/relabel.sh: labels by a scorer, once, kept beside the dataset."""

from __future__ import annotations

import io
import os
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdpo.tinyworld import oracle
from sdpo.tinyworld.pairs import write_pairs

from .harness import as_argv, free_port, identical, program, run_here


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """40 pairs: ties, inverted labels, one pair of equal images, one with a broken image."""
    directory = tmp_path_factory.mktemp("made")
    write_pairs(directory, 40, 0, seed=5, tie_share=0.1)
    rows = pq.read_table(next(directory.glob("*.parquet"))).to_pylist()
    for row in rows[::3]:
        if row["label_0"] != 0.5:
            row["label_0"] = 1.0 - row["label_0"]
    decided = [i for i, row in enumerate(rows) if row["label_0"] != 0.5]
    rows[decided[1]]["jpg_1"] = rows[decided[1]]["jpg_0"]
    rows[decided[2]]["jpg_0"] = b"broken"
    return rows


def write(rows, directory):
    directory.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), directory / "train-00000-of-00001.parquet")
    return directory


def scores(row):
    images = (Image.open(io.BytesIO(row[name])).convert("RGB") for name in ("jpg_0", "jpg_1"))
    return [oracle.score(image, row["caption"]).score for image in images]


@pytest.fixture(scope="module")
def expected(table):
    """The rows as the oracle labels them, and the sentence about it."""
    relabelled, agree, differ = [], 0, 0
    for row in table:
        label = row["label_0"]
        if label != 0.5 and row["jpg_0"] != b"broken":
            first, second = scores(row)
            if first != second:
                choice = float(first > second)
                agree, differ = agree + (choice == label), differ + (choice != label)
                label = choice
        relabelled.append({**row, "label_0": label})
    share = 100 * agree / (agree + differ)
    assert 5 < differ < agree
    return relabelled, (
        f"oracle agrees with the human labels in {share:.1f} % of {agree + differ} pairs; "
        "1 with equal scores keep their label, 1 cannot be decoded"
    )


def script(*arguments, **environment):
    env = {**os.environ, "SDPO_PYTHON": sys.executable, "SDPO_SKIP_INSTALL": "1", **environment}
    return program("bash", "scripts/data/relabel.sh", *arguments, env=env)


@pytest.fixture(scope="module")
def relabelled(table, tmp_path_factory):
    """relabel.sh's console text, the data and the cache."""
    data = write(table, tmp_path_factory.mktemp("data"))
    cache = tmp_path_factory.mktemp("cache")
    flags = as_argv({"choice_model": "oracle", "train_data_dir": data, "cache_dir": cache})
    done = script(*flags, "--batch_size", 6)
    assert done.returncode == 0, done.stderr
    return done.stdout, data, cache, flags


def kept(cache):
    (path,) = cache.rglob("choices-oracle-train-*.parquet")
    return path


def test_scores_and_agreement(table, expected, relabelled):
    text, _, cache, _ = relabelled
    assert expected[1] in text
    assert str(kept(cache)) in text
    stored = {row["row"]: row for row in pq.read_table(kept(cache)).to_pylist()}
    assert stored.keys() == {i for i, row in enumerate(table) if row["label_0"] != 0.5}
    for number, row in stored.items():
        if table[number]["jpg_0"] == b"broken":
            assert row["score_0"] is row["score_1"] is None
        else:
            assert [row["score_0"], row["score_1"]] == pytest.approx(scores(table[number]))


def test_training_finds_them_and_uses_them(
    table, expected, relabelled, train, tmp_path, monkeypatch
):
    """As if the data had been labelled so; and nothing is scored in training."""
    from sdpo.evaluation.score.scorers.oracle import Scorer

    _, data, cache, _ = relabelled
    monkeypatch.delattr(Scorer, "score")
    flags = {"max_train_steps": 4, "train_batch_size": 4, "max_bad_fraction": 1.0}
    chosen = train(
        tmp_path / "a", train_data_dir=data, cache_dir=cache, choice_model="oracle", **flags
    )
    labelled = write(expected[0], tmp_path / "labelled")
    same = train(tmp_path / "b", train_data_dir=labelled, **flags)
    human = train(tmp_path / "c", train_data_dir=data, **flags)
    assert identical(chosen.unet(), same.unet())
    assert not identical(chosen.unet(), human.unet())


def test_training_does_it_itself_where_it_was_not_done(table, expected, train, tmp_path, capsys):
    data, cache = write(table, tmp_path / "data"), tmp_path / "cache"
    flags = {"max_bad_fraction": 1.0, "choice_model": "oracle"}
    train(tmp_path / "a", train_data_dir=data, cache_dir=cache, **flags)
    assert expected[1] in capsys.readouterr().out
    line = train.fails(
        tmp_path / "a", train_data_dir=data, cache_dir=cache, max_train_steps=9, max_bad_fraction=1
    )
    assert "--choice_model oracle" in line


def test_killed_and_gone_on(relabelled, tmp_path, monkeypatch, capsys):
    import sdpo.evaluation.score.relabel

    text, _, _, flags = relabelled
    monkeypatch.setattr(sdpo.evaluation.score.relabel, "PAIRS_A_SAVE", 10)
    whole, seen = sdpo.evaluation.score.relabel.score_pairs, []

    def until(pairs, places, run, options):
        if len(seen) == 20:
            raise KeyboardInterrupt
        seen.extend(places)
        return whole(pairs, places, run, options)

    own = [*flags, "--cache_dir", tmp_path / "cache", "--batch_size", 6]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(sdpo.evaluation.score.relabel, "score_pairs", until)
        run_here("eval/relabel.py", own)
    again = []

    def watched(pairs, places, run, options):
        again.extend(places)
        return whole(pairs, places, run, options)

    monkeypatch.setattr(sdpo.evaluation.score.relabel, "score_pairs", watched)
    assert run_here("eval/relabel.py", own) == 0
    assert not set(again) & set(seen)
    sentence = re.search("oracle agrees.*decoded", text)[0]
    assert sentence in capsys.readouterr().out


def test_two_processes(relabelled, tmp_path):
    _, _, cache, flags = relabelled
    own = [*flags, "--cache_dir", tmp_path / "cache", "--batch_size", 6]
    launch = f"--multi_gpu --num_processes 2 --main_process_port {free_port()}"
    done = script(*own, SDPO_LAUNCH_ARGS=launch, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    one, two = (pq.read_table(kept(c)).to_pandas() for c in (cache, tmp_path / "cache"))
    assert one["row"].tolist() == two["row"].tolist()
    for side in ("score_0", "score_1"):
        assert np.allclose(one[side], two[side], equal_nan=True)


def test_other_weights_are_scored_anew(table, train, tmp_path, capsys):
    from scripts.parity.small_scorers import write_clip

    data, cache = write(table, tmp_path / "data"), tmp_path / "cache"
    for name in ("one", "two"):
        (path,) = write_clip(tmp_path / name).values()
        flags = {"choice_model": "clip", "choice_weights": [f"clip={path}"]}
        train(
            tmp_path / f"run-{name}",
            train_data_dir=data,
            cache_dir=cache,
            max_bad_fraction=1.0,
            max_train_steps=1,
            **flags,
        )
    assert len(list(cache.rglob("choices-clip-train-*.parquet"))) == 2
    assert "clip agrees with the human labels in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"choice_model": "mine"}, "--choice_model"),
        ({"choice_model": "oracle", "streaming": True}, "does not go with --streaming"),
        ({"choice_weights": ["clip=x/y"]}, "--choice_weights has no meaning"),
        ({"choice_model": "oracle", "choice_weights": ["clip=x/y"]}, "is not a part of oracle"),
        ({"choice_model": "clip", "choice_weights": ["clip=/no"]}, "--choice_weights clip: there"),
        ({"choice_model": "hpsv2"}, "hpsv2: cannot get HPS_v2_compressed.pt"),
    ],
)
def test_mistakes(train, tmp_path, flags, said):
    assert said in train.fails(tmp_path / "run", **flags)


def test_the_script_answers_mistakes_once(relabelled):
    done = script("--choice_model", "oracle", "--train_data_dir", "nowhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "relabel.py: error: --train_data_dir: there is no directory nowhere"

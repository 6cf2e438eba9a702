"""Preference sets in their own columns: winners are winners, ties are dropped, guesses refused."""

from __future__ import annotations

import csv
import json
import logging
from itertools import islice

import pytest

from sdpo.common.errors import UserError
from sdpo.data.columns import Layout, judge
from sdpo.data.loader import PairLoader
from sdpo.data.source import open_pairs

# Image number i: winners are grey 100 + i, losers i (see conftest).


@pytest.fixture
def images(make_rows, tmp_path):
    """Four pairs of images, ((winner, loser), ...), as bytes."""
    return [(r["jpg_0"], r["jpg_1"]) for r in make_rows(4, labels=[1.0] * 4)]


@pytest.fixture
def files(images, tmp_path):
    """Writes them as DIR/images/{w,l}N.png; gives the paths as `files(DIR)`."""

    def write(directory, folder="images"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
        for i, pair in enumerate(images):
            for name, content in zip("wl", pair, strict=True):
                (directory / folder / f"{name}{i}.png").write_bytes(content)
        return [(f"{folder}/w{i}.png", f"{folder}/l{i}.png") for i in range(len(images))]

    return write


@pytest.fixture
def trained(make_config, rows_of):
    """`trained(directory, **flags)`: the pairs of an epoch, {row: caption}, winners checked."""

    def read(directory, streaming=False, **flags):
        flags = {"resolution": 16, "train_batch_size": 1, "proportion_empty_prompts": 0, **flags}
        config = make_config(train_data_dir=directory, streaming=streaming, **flags)
        source = open_pairs(config.data, 0)
        count = len(source) if not streaming else 30
        found = {}
        for batch in islice(iter(PairLoader(source, config, 0, 1)), count):
            ((winner, loser),) = rows_of(batch)
            assert winner == loser, "winner and loser are of different rows"
            assert batch.pixels[0].mean() > batch.pixels[1].mean(), "the loser is trained as winner"
            found[winner] = batch.captions[0]
        return found

    return read


def write(directory, name, rows, features=None):
    """Write rows as parquet, JSON lines, a JSON list or CSV, by the name."""
    directory.mkdir(exist_ok=True)
    if name.endswith("parquet"):
        import datasets

        table = datasets.Dataset.from_list(rows)
        for column in features or ():
            table = table.cast_column(column, datasets.Image())
        table.to_parquet(directory / name)
    elif name.endswith("csv"):
        with open(directory / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
        (directory / name).write_text(text)
    return directory


def expected(*rows):
    return {i: f"caption {i}" for i in rows}


BY_ORDER = {
    "chosen": ("chosen", "rejected"),  # open-image-preferences, nbeerbower, TRL
    "path": ("path1", "path2"),  # HPDv3
    "diffsynth": ("image", "lose_image"),
    "longcat": ("img_path_win", "img_path_lose"),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_chosen_and_rejected_as_images(trained, images, tmp_path, streaming):
    rows = [
        {
            "prompt": f"caption {i}",
            "chosen": {"bytes": won, "path": None},
            "rejected": {"bytes": lost, "path": None},
            "chosen_model": "a",
            "rejected_model": "b",
            "category": "c",
            "sub_category": "d",
        }
        for i, (won, lost) in enumerate(images)
    ]
    write(tmp_path, "train-00000-of-00001.parquet", rows, ("chosen", "rejected"))
    assert trained(tmp_path, streaming) == expected(0, 1, 2, 3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "train.json", "pairs.jsonl"])
@pytest.mark.parametrize("layout", list(BY_ORDER))
def test_pairs_by_order_as_paths(trained, files, tmp_path, layout, kind, streaming):
    won_name, lost_name = BY_ORDER[layout]
    extra = {"width": 64, "height": 64} if layout == "longcat" else {}
    rows = [
        {won_name: won, lost_name: lost, "prompt": f"caption {i}", **extra}
        for i, (won, lost) in enumerate(files(tmp_path))
    ]
    write(tmp_path, kind, rows)
    assert trained(tmp_path, streaming) == expected(0, 1, 2, 3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "votes", ["votes_image{}", "weighted_results_image{}", "weighted_results_image{}_preference"]
)
def test_votes(trained, images, tmp_path, votes, streaming, caplog):
    # Row 0: 1 wins by 9 to 1; row 1: 2 wins by 6 to 4; row 2 is a tie; row 3 has none.
    counts = [(9, 1), (4, 6), (5, 5), (None, None)]
    rows = [
        {
            "prompt": f"caption {i}",
            "image1": {"bytes": won if i != 1 else lost, "path": None},
            "image2": {"bytes": lost if i != 1 else won, "path": None},
            votes.format(1): counts[i][0],
            votes.format(2): counts[i][1],
            "model1": "a",
            "model2": "b",
        }
        for i, (won, lost) in enumerate(images)
    ]
    write(tmp_path, "train_0001-00000-of-00001.parquet", rows, ("image1", "image2"))
    assert trained(tmp_path, streaming) == expected(0, 1)
    assert trained(tmp_path, streaming, min_agreement=0.6) == expected(0, 1)
    with caplog.at_level(logging.INFO, "sdpo"):
        assert trained(tmp_path, streaming, min_agreement=0.7) == expected(0)
    dropped = "1 ties dropped, 1 without a label dropped, 1 below --min_agreement 0.7 dropped"
    assert (f"4 rows: 1 decided pairs, {dropped}" in caplog.text) != streaming
    assert trained(tmp_path, streaming, split="train_0001") == expected(0, 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["train.json", "train.parquet", "metadata.jsonl"])
def test_hpdv3_s_choices_are_partly_null(trained, files, tmp_path, kind, streaming, caplog):
    choices = [[9, 1], None, [6, 4], None]
    rows = [
        {
            "prompt": f"caption {i}",
            "path1": won,
            "path2": lost,
            "model1": "a",
            "model2": "b",
            "choice_dist": choices[i],
        }
        for i, (won, lost) in enumerate(files(tmp_path / "elsewhere"))
    ]
    write(tmp_path, kind, rows)
    root = {"image_root": tmp_path / "elsewhere"}
    assert trained(tmp_path, streaming, **root) == expected(0, 1, 2, 3)
    assert trained(tmp_path, streaming, min_agreement=0.7, **root) == expected(0, 1, 3)
    with caplog.at_level(logging.INFO, "sdpo"):
        trained(tmp_path, streaming, **root)
    assert "label=first, the winner's share of the votes by choice_dist" in caplog.text


@pytest.mark.parametrize(
    ("row", "layout", "share"),
    [
        ({"a": 9, "b": 1}, Layout("x", "y", "votes:a,b"), 0.9),
        ({"a": 1, "b": 3}, Layout("x", "y", "votes:a,b"), 0.25),
        ({"a": "0.2", "b": "0.3"}, Layout("x", "y", "votes:a,b"), 0.4),
        ({"a": 0, "b": 0}, Layout("x", "y", "votes:a,b"), 0.5),
        ({"a": 0, "b": 2}, Layout("x", "y", "votes:a,b"), 0.0),
        # Scores that are no counts have no shares.
        ({"a": -3.5, "b": -4}, Layout("x", "y", "votes:a,b"), 1.0),
        ({"a": -3.5, "b": 4}, Layout("x", "y", "votes:a,b"), 0.0),
        ({"c": [9, 1]}, Layout("x", "y", "first", votes="c"), 0.9),
        ({"c": [0, 0]}, Layout("x", "y", "first", votes="c"), 1.0),
        # The order says who won.
        ({"c": [1, 9]}, Layout("x", "y", "first", votes="c"), 1.0),
        ({"c": None}, Layout("x", "y", "first", votes="c"), 1.0),
        ({}, Layout("x", "y", "first"), 1.0),
        ({"x": ["p", "q"], "s": [0.3, 0.1]}, Layout("x", "x", "list:s"), 1.0),
        ({"m": 0.3}, Layout("x", "y", "m"), 0.3),
    ],
)
def test_shares_of_the_votes(row, layout, share):
    label, _ = judge(row, layout, None)
    assert label == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_hpdv2_s_lists(trained, files, tmp_path, kind, streaming):
    pairs = files(tmp_path)
    preference = [[1, 0], [0, 1], [1, 1], [1, 0]]
    train = [
        {
            "prompt": f"caption {i}",
            "file_path": [won, lost] if i != 1 else [lost, won],
            "human_preference": preference[i],
        }
        for i, (won, lost) in enumerate(pairs)
    ]
    # The first in rank is the best one; of three images the first and the last are taken.
    middle = "images/none.png"
    test = [
        {"prompt": "caption 0", "image_path": [pairs[0][1], pairs[0][0]], "rank": [2, 1]},
        {"prompt": "caption 1", "image_path": [pairs[1][0], pairs[1][1]], "rank": [1.5, 1.5]},
        {"prompt": "caption 2", "image_path": [middle, *pairs[2]], "rank": [2, 1, 3]},
    ]
    write(tmp_path, f"train.{kind}", train)
    write(tmp_path, f"test.{kind}", test)
    assert trained(tmp_path, streaming) == expected(0, 1, 3)
    assert trained(tmp_path, streaming, split="test") == expected(0, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_w_and_l(trained, images, tmp_path, streaming, caplog):
    for side, suffixes in (("w", [".png"] * 4), ("l", [".png", ".PNG", ".png", ".png"])):
        (tmp_path / "train" / side).mkdir(parents=True)
        for i, suffix in enumerate(suffixes):
            path = tmp_path / "train" / side / f"{i}{suffix}"
            path.write_bytes(images[i]["wl".index(side)])
    for i in range(4):
        name = f"w/{i}.txt" if i % 2 else f"l/{i}.caption"
        (tmp_path / "train" / name).write_text(f"caption {i}\n")
    with caplog.at_level(logging.INFO, "sdpo"):
        assert trained(tmp_path, streaming) == expected(0, 1, 2, 3)
    assert f"{tmp_path / 'train' / 'w'} is preferred to {tmp_path / 'train' / 'l'}" in caplog.text
    assert trained(tmp_path / "train", streaming) == expected(0, 1, 2, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "l" / "a.png").unlink(), r"w/a.png has no counterpart .*1 of 2"),
        (lambda d: (d / "w" / "a.txt").unlink(), r"w/a has no caption: add a.txt"),
        (lambda d: (d / "l" / "a.txt").write_text("other"), "are captions of one pair and differ"),
        (lambda d: (d / "w" / "a.txt").write_bytes(b"\xe9"), "a.txt is not UTF-8"),
        (lambda d: (d / "w" / "a.jpg").write_bytes(b""), "have one name"),
    ],
)
def test_folders_that_do_not_fit(trained, images, tmp_path, change, said):
    for i, side in enumerate("wl"):
        (tmp_path / side).mkdir()
        for name in "ab":
            (tmp_path / side / f"{name}.png").write_bytes(images[0][i])
            (tmp_path / "w" / f"{name}.txt").write_text("x")
    change(tmp_path)
    with pytest.raises(UserError, match=said):
        trained(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "first"),
        ({"mark": 1}, "mark"),
        ({"up": 3, "down": 2}, "votes:up,down"),
        ({"caption": "wrong", "label_0": 0}, "first"),
    ],
)
def test_columns_flag(trained, files, tmp_path, caplog, values, label, streaming):
    rows = [
        {"a": won, "b": lost, "said": f"caption {i}", **values}
        for i, (won, lost) in enumerate(files(tmp_path))
    ]
    write(tmp_path, "metadata.jsonl", rows)
    with caplog.at_level(logging.INFO, "sdpo"):
        columns = ["caption=said", "image_0=a", "image_1=b", f"label={label}"]
        assert trained(tmp_path, streaming, columns=columns) == expected(0, 1, 2, 3)
    assert f"columns: caption=said image_0=a image_1=b label={label}" in caplog.text


def test_columns_flag_of_the_caption_alone(trained, files, tmp_path):
    rows = [
        {"chosen": won, "rejected": lost, "prompt": "no", "said": f"caption {i}"}
        for i, (won, lost) in enumerate(files(tmp_path))
    ]
    write(tmp_path, "metadata.jsonl", rows)
    assert trained(tmp_path, columns=["caption=said"]) == expected(0, 1, 2, 3)
    assert trained(tmp_path, caption_column="said") == expected(0, 1, 2, 3)


def test_derived_rows_can_be_cached_and_labelled_anew(make_config, files, tmp_path):
    import numpy as np

    from sdpo.data.ai_labels import ChoiceScores, with_choices
    from sdpo.data.latents.identity import dataset_digest

    rows = [
        {"prompt": "p", "file_path": [won, lost], "human_preference": [1, 0] if i else [1, 1]}
        for i, (won, lost) in enumerate(files(tmp_path))
    ]
    write(tmp_path, "train.json", rows)
    source = open_pairs(make_config(train_data_dir=tmp_path).data, 0)
    before = dataset_digest(source)
    scores = ChoiceScores(tmp_path / "scores.parquet", 4)
    scores.put([1, 2, 3], np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    labelled, agreement = with_choices(source, scores)
    assert [labelled.row(i)["label_0"] for i in range(3)] == [0.0, 1.0, 1.0]
    assert (agreement.agree, agreement.differ, agreement.equal) == (1, 1, 1)
    (tmp_path / "images" / "w2.png").write_bytes(b"other")
    assert dataset_digest(source) != before


def test_columns_flag_of_lists(trained, files, tmp_path):
    rows = [
        {"both": [lost, won], "score": [0.25, 0.5], "text": f"caption {i}"}
        for i, (won, lost) in enumerate(files(tmp_path))
    ]
    write(tmp_path, "metadata.jsonl", rows)
    columns = ["caption=text", "image_0=both", "image_1=both", "label=list:score"]
    assert trained(tmp_path, columns=columns) == expected(0, 1, 2, 3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "flags", "said"),
    [
        ({"a": "x", "b": "y", "prompt": "p"}, {}, "no column label_0; its columns are: a, b, pr"),
        ({"a": "x", "b": "y", "prompt": "p"}, {}, r"--columns, e\.g\. caption=prompt image_0="),
        (
            {"chosen": "x", "rejected": "y", "path1": "a", "path2": "b", "prompt": "p"},
            {},
            "chosen, rejected by first or as path1, path2 by first",
        ),
        ({"chosen": "x", "rejected": "y", "said": "p"}, {}, "--caption_column: .*caption or promp"),
        ({"chosen": "x", "rejected": "y", "prompt": "p"}, {"min_agreement": 0.5}, "no votes"),
        ({"a": "x", "b": "y", "p": "p"}, {"columns": ["image_0=z"]}, "--columns: .* no column lab"),
        (
            {"a": "x", "b": "y", "caption": "p"},
            {"columns": ["image_0=a", "image_1=b", "label=votes:up,down"]},
            "--columns: .* no column up",
        ),
        (
            {"a": "x", "b": "y", "caption": "p", "up": "many", "down": 1},
            {"columns": ["image_0=a", "image_1=b", "label=votes:up,down"]},
            "column up must hold numbers, found 'many'",
        ),
        (
            {"a": "x", "b": "y", "caption": "p", "mark": "left"},
            {"columns": ["image_0=a", "image_1=b", "label=mark"]},
            "row 0: label_0 is 'left'",
        ),
        ({"file_path": ["x", "y"], "human_preference": [1], "prompt": "p"}, {}, "2 images in fil"),
        ({"chosen": ["x"], "rejected": ["y"], "prompt": "p"}, {}, "must hold images or paths"),
    ],
)
def test_unknown_columns_are_one_sentence(make_config, tmp_path, row, flags, said, streaming):
    write(tmp_path, "metadata.jsonl", [row])
    config = make_config(train_data_dir=tmp_path, streaming=streaming, resolution=16, **flags)
    with pytest.raises(UserError, match=said) as caught:
        next(iter(PairLoader(open_pairs(config.data, 0), config, 0, 1)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "columns",
    [["picture=a"], ["image_0"], ["image_0="], ["label=first", "label=x"], ["label=votes:a"]],
)
def test_columns_flag_s_form(make_config, columns):
    with pytest.raises(UserError, match=r"--columns: .*"):
        make_config(columns=columns)


def test_image_root_must_be_there(make_config):
    with pytest.raises(UserError, match="--image_root: there is no directory nowhere"):
        make_config(image_root="nowhere")


def test_several_tables_are_not_guessed_among(make_config, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"several tables \(a.jsonl, b.jsonl\)"):
        make_config(train_data_dir=tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_save_to_disk(trained, make_config, make_rows, tmp_path, streaming):
    import datasets

    parts = {}
    for split in ("train", "heldout"):
        rows = [{**r, "caption": split} for r in make_rows(4)]
        parts[split] = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    for split in parts:
        found = trained(tmp_path / "dict", streaming, split=split)
        assert found == dict.fromkeys(range(4), split)
    with pytest.raises(UserError, match=r"--split: .* no split 'test'; it has: heldout, train"):
        make_config(train_data_dir=tmp_path / "dict", split="test")
    parts["train"].save_to_disk(tmp_path / "x[1]")
    assert trained(tmp_path / "x[1]", streaming) == dict.fromkeys(range(4), "train")
    with pytest.raises(UserError, match=r"--split: nothing in .* names a split"):
        make_config(train_data_dir=tmp_path / "x[1]", split="heldout")
    datasets.Dataset.from_list(make_rows(2), split="train").save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"--split: .* holds split 'train' and not 'heldout'"):
        make_config(train_data_dir=tmp_path / "one", split="heldout")


def test_derived_rows_lie_in_the_cache_too(make_config, files, tmp_path):
    rows = [{"chosen": won, "rejected": lost, "prompt": "p"} for won, lost in files(tmp_path)]
    write(tmp_path, "metadata.jsonl", rows)
    source = open_pairs(make_config(train_data_dir=tmp_path).data, 0)
    assert source.rows.cache_files
    assert source.row(0)["label_0"] == 1.0

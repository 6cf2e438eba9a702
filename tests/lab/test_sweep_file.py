"""A sweep's YAML: the runs that come of it, and its mistakes, each in one sentence."""

from __future__ import annotations

import pytest
import yaml

from sdpo.common.errors import UserError
from sdpo.lab.sweep import run as sweep
from sdpo.lab.sweep.file import read_sweep
from sdpo.lab.sweep.reference import shared_caches


@pytest.fixture
def content(tiny_sd15, pairs_dir):
    """The least that a file must hold, with a little speed."""
    model, pairs = str(tiny_sd15), str(pairs_dir)
    return {"flags": {"pretrained_model_name_or_path": model, "train_data_dir": pairs}}


@pytest.fixture
def written(tmp_path):
    """Writes a file; text as it is."""

    def write(content):
        path = tmp_path / "three.yaml"
        if not isinstance(content, str):
            content = yaml.safe_dump(content, sort_keys=False)
        path.write_text(content)
        return path

    return write


def caches(content, written):
    """The cache of each run."""
    runs = read_sweep(written(content)).runs
    shared = shared_caches(runs)
    return [shared.get(run.name) for run in runs]


def test_runs_that_ask_the_reference_the_same_share_its_errors(content, written):
    content |= {
        "variants": {
            "none": {},
            "pair": {"use_winner_preserving": True, "winner_preserving_scope": "pair"},
            "dmpo": {"train_method": "dmpo", "beta_dpo": 1, "use_adafactor": True},
            "lora": {"lora_rank": 2, "learning_rate": 1e-3, "max_train_steps": 7},
            "dspo": {"train_method": "dspo"},
            "offset": {"noise_offset": 0.1},
            "batch": {"train_batch_size": 2},
            "stream": {"streaming": True, "max_train_steps": 5},
        },
        "seeds": [0, 1],
    }
    found = caches(content, written)
    ours, seed_1 = found[:2]
    assert ours and seed_1 and ours != seed_1
    assert found == [ours, seed_1] * 4 + [None] * 8
    content["variants"]["batch too"] = {"train_batch_size": 2, "train_method": "dmpo"}
    assert len({*caches(content, written)} - {None, ours, seed_1}) == 2


def test_a_run_that_is_alone_has_no_cache(content, written):
    assert caches(content | {"seeds": [0, 1, 2]}, written) == [None] * 3


def test_the_least(content, written):
    found = read_sweep(written(content))
    assert found.name == "three"
    assert [(run.name, run.variant, run.seed) for run in found.runs] == [
        ("three_seed-0", "three", 0)
    ]
    assert found.groups == ("variant",)
    assert found.heldout is found.images is None


def test_every_combination_with_later_flags_winning(content, written):
    content["flags"] |= {"beta_dpo": 7, "winner_preserving_mu": 0.1}
    content |= {
        "variants": {"none": None, "fixed mu": {"use_winner_preserving": True}},
        "grid": {"beta_dpo": [500, 5000], "train_method": ["dmpo"]},
        "seeds": [3, 1],
    }
    found = read_sweep(written(content))
    assert [run.name for run in found.runs] == [
        f"{variant}_beta_dpo-{beta}_train_method-dmpo_seed-{seed}"
        for variant in ("none", "fixed-mu")
        for beta in (500, 5000)
        for seed in (3, 1)
    ]
    last = found.runs[-1]
    assert last.flags["beta_dpo"] == 5000
    assert last.flags["seed"] == 1
    assert last.flags["winner_preserving_mu"] == 0.1
    # Defaults are filled in: the first variant says nothing of the safeguard.
    assert [run.varied for run in found.runs[::4]] == [
        {"use_winner_preserving": safe, "beta_dpo": 500.0, "train_method": "dmpo"}
        for safe in (False, True)
    ]
    assert found.groups == ("variant", "beta_dpo", "train_method")


def test_numbers_without_a_point_are_numbers(content, written):
    # YAML 1.1 takes 5e-5 for text.
    text = yaml.safe_dump(content) + "grid:\n  learning_rate: [5e-5, 1e-4]\n"
    found = read_sweep(written(text))
    assert [run.varied["learning_rate"] for run in found.runs] == [5e-5, 1e-4]
    assert found.groups == ("learning_rate",)


def test_images_are_of_the_model_that_is_trained(content, written, tiny_sd15):
    content["flags"] |= {"resolution": 32}
    content["images"] = {"suites": "tinyworld", "scorers": "oracle", "checkpoints": "all"}
    found = read_sweep(written(content))
    assert found.checkpoints == "all"
    assert found.scorers == ["oracle"]
    images = found.image_config.generation
    assert images.pretrained_model_name_or_path == str(tiny_sd15)
    assert images.pretrained_vae_model_name_or_path is None
    assert (images.resolution, images.unet) == (32, "base")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"seed": [1]}, "there is no key seed; the keys are name, flags"),
        ({"flags": {"beta": 1}}, r"flags: train.py has no flag --beta$"),
        ({"flags": {"output_dir": "x"}}, "flags: the sweep sets output_dir itself"),
        ({"flags": {"cache_reference": "x"}}, "flags: the sweep sets cache_reference itself"),
        ({"flags": [1]}, "flags: must be a mapping"),
        ({"flags": {}}, "run three_seed-0: .*--pretrained_model_name_or_path"),
        ({"variants": {"a": {"mu": 1}}}, "variants, a: train.py has no flag --mu"),
        ({"variants": {"a": {"seed": 1}}}, "variants, a: the sweep sets seed itself"),
        ({"variants": {True: {}}}, "variants: a name must be text, got True; put it in quotes"),
        ({"variants": {"a b": {}, "a/b": {}}}, "two runs would have the name a-b_seed-0"),
        ({"variants": {"a": {"winner_preserving_mu": 2}}}, "run a_seed-0: --winner_preserving_mu"),
        ({"variants": {"a": {"beta_dpo": True}}}, "run a_seed-0: argument --beta_dpo: expected"),
        ({"grid": {"beta_dpo": 5}}, r"grid, beta_dpo: must be a list of values"),
        ({"grid": {"beta_dpo": []}}, r"grid, beta_dpo: must be a list of values"),
        ({"grid": {"beta_dpo": [5, -1]}}, "run three_beta_dpo--1_seed-0: --beta_dpo must be"),
        (
            {"grid": {"beta_dpo": [5]}, "variants": {"a": {"beta_dpo": 1}}},
            "beta_dpo is set by the grid and by the variant a",
        ),
        ({"seeds": [1, 1]}, "seeds: must be different numbers"),
        ({"seeds": 3}, "seeds: must be different numbers"),
        ({"heldout": {"split": "nowhere"}}, "heldout: --split: .* no parquet files of split"),
        ({"heldout": {"max_pairs": 3}}, "heldout: .*--split"),
        (
            {"heldout": {"split": "heldout", "timesteps": 0}},
            "heldout: --timesteps must be at least",
        ),
        ({"heldout": {"split": "heldout", "ema": True}}, "heldout: the sweep sets ema itself"),
        ({"images": {"suits": "tinyworld"}}, "images: evaluate.py has no flag --suits"),
        ({"images": {"suites": "none.txt"}}, "none.txt"),
        ({"images": {"scorers": "orakel"}}, "images: --scorers: there is no scorer 'orakel'"),
        ({"images": {"checkpoints": "some"}}, "images, checkpoints: must be last or all"),
        (
            {"images": {"scorers": "oracle"}, "variants": {"a": {}, "b": {"resolution": 32}}},
            "images: all runs must start from one model, but a_seed-0 and b_seed-0 differ in",
        ),
        ({"name": "//"}, "name: must hold a letter"),
    ],
)
def test_mistakes(content, written, more, sentence):
    flags = more.get("flags", {})
    if isinstance(flags, dict) and flags:
        more = {**more, "flags": content["flags"] | flags}
    path = written(content | more)
    with pytest.raises(UserError, match=sentence) as raised:
        read_sweep(path)
    assert "\n" not in str(raised.value)
    if "none.txt" not in sentence:
        assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not YAML: "),
        ("[1, 2]", "must be a mapping with the keys name, flags"),
        ("", "must be a mapping"),
        ("variants:\n  a: {}\n  b: {}\n  a: {}\n", "the mapping that begins in line 2 has a twice"),
    ],
)
def test_text_that_is_no_sweep(written, text, sentence):
    path = written(text)
    with pytest.raises(UserError, match=sentence) as raised:
        read_sweep(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_command_lines(content, written, tmp_path):
    path = written(content)
    with pytest.raises(UserError, match=r"there is no file .*none.yaml"):
        sweep.main([str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="--jobs must be at least 1, got 0"):
        sweep.main([str(path), "--jobs", "0"])
    with pytest.raises(UserError, match=r"--out: .* is not a directory"):
        sweep.main([str(path), "--out", str(path)])


def test_dry_run_touches_nothing(content, written, tmp_path, capsys):
    content |= {"heldout": {"split": "heldout"}, "images": {"scorers": "oracle"}}
    out = tmp_path / "out"
    assert sweep.main([str(written(content)), "--out", str(out), "--dry_run"]) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# three_seed-0, training",
        "# three_seed-0, held-out",
        "# three_seed-0, images: depends on the above",
        "# base, images",
    ]
    (training,) = (line for line in lines if "train.py" in line)
    assert f"--output_dir {out}/runs/three_seed-0" in training

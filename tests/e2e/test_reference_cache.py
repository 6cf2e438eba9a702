"""--cache_reference: the same training from the reference's errors that an earlier run kept."""

from __future__ import annotations

import logging
import re
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdpo.common.errors import UserError
from sdpo.training.reference_cache import ask
from sdpo.training.reference_cache.records import RECORD

from .harness import FLAGS as DIVIDED
from .harness import base_unet, check_close, distance, files, identical, run_here

# 12 pairs, 2 x 2 a step: three steps an epoch.
FLAGS = {
    "max_train_samples": 12,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 5,
    "checkpointing_steps": 2,
    "learning_rate": 1e-3,
    "beta_dpo": 500.0,
    "use_winner_preserving": True,
    "noise_offset": 0.05,
}
PAIRS = 4 * FLAGS["max_train_steps"]
OTHERS = {
    "dmpo": {"train_method": "dmpo", "winner_preserving_scope": "pair", "use_adafactor": True},
    "parameter": {"winner_preserving_space": "parameter", "winner_preserving_mu": 0.1},
    "lora": {"lora_rank": 2, "mixed_precision": "bf16", "beta_dpo": 100.0},
}


def kept(directory):
    """The files of errors, and how many they hold."""
    paths = sorted(directory.glob("errors-*.bin"))
    return paths, sum(path.stat().st_size for path in paths) // RECORD.itemsize


@pytest.fixture
def asked(monkeypatch):
    """What the reference was asked while the test ran: the number of pairs each time."""
    batches = []
    predict = ask.predict_reference

    def counted(family, reference, inputs, autocast):
        batches.append(len(inputs.noisy) // 2)
        return predict(family, reference, inputs, autocast)

    monkeypatch.setattr(ask, "predict_reference", counted)
    return batches


@pytest.fixture
def no_reference(monkeypatch):
    """Building or asking one fails."""

    def used(*args, **kwargs):
        raise AssertionError("there is a reference")

    monkeypatch.setattr("sdpo.models.reference.make_reference", used)
    monkeypatch.setattr("sdpo.models.reference.AdaptersOff", used)
    monkeypatch.setattr(ask, "predict_reference", used)


@pytest.fixture(scope="module")
def first(train, tmp_path_factory):
    """(directory of a cache, the run that filled it), which is not written to."""
    where = tmp_path_factory.mktemp("first")
    run = train(where / "run", **FLAGS, cache_reference=where / "kept")
    return where / "kept", run


def same(run, other):
    assert run.numbers == other.numbers
    assert identical(run.unet(), other.unet())


def test_a_run_that_fills_it_and_one_that_reads_it_are_the_plain_one(
    train, first, tmp_path, no_reference
):
    kept_in, run = first
    paths, count = kept(kept_in)
    assert len(paths) == 1 and count == PAIRS
    before = files(kept_in)
    same(train(tmp_path / "found", **FLAGS, cache_reference=kept_in), run)
    assert files(kept_in) == before


def test_the_run_that_fills_it_is_the_plain_one(train, first, tmp_path):
    same(first[1], train(tmp_path / "plain", **FLAGS))


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_and_options_share_it(train, first, tmp_path, request, name):
    kept_in, flags = first[0], {**FLAGS, **OTHERS[name]}
    if name == "lora":
        kept_in = tmp_path / "kept"
        train(tmp_path / "fill", **FLAGS, mixed_precision="bf16", cache_reference=kept_in)
    plain = train(tmp_path / "plain", **flags)
    request.getfixturevalue("no_reference")
    same(train(tmp_path / "found", **flags, cache_reference=kept_in), plain)


def test_what_is_missing_alone_is_computed(train, first, tmp_path, asked, caplog):
    """A longer run; and one whose last record was torn by a kill, another damaged."""
    shutil.copytree(first[0], tmp_path / "kept")
    flags = {**FLAGS, "max_train_steps": 6, "cache_reference": tmp_path / "kept"}
    caplog.set_level(logging.INFO, "sdpo")
    longer = train(tmp_path / "longer", **flags)
    assert asked == [2, 2]
    assert f"{tmp_path / 'kept'}: of 12 micro-batches 10 are there, the rest is" in caplog.text
    paths, count = kept(tmp_path / "kept")
    assert len(paths) == 2 and count == PAIRS + 4
    same(longer, train(tmp_path / "plain", **{**flags, "cache_reference": None}))
    (old,) = (path for path in paths if path.stat().st_size == PAIRS * RECORD.itemsize)
    content = bytearray(old.read_bytes())
    content[4 * RECORD.itemsize] ^= 1  # in the third micro-batch
    old.write_bytes(content[:-7])
    asked.clear()
    same(train(tmp_path / "again", **flags), longer)
    assert asked == [2, 2]
    assert kept(tmp_path / "kept")[1] == PAIRS + 4 - 1 + 4


def test_a_run_that_was_killed_goes_on(train, first, tmp_path, asked):
    flags = {**FLAGS, "cache_reference": tmp_path / "kept"}
    fork = train.fork(tmp_path / "run", **flags)
    assert fork.send_at_step(signal.SIGKILL, tmp_path / "run", 3) == -signal.SIGKILL
    found = kept(tmp_path / "kept")[1]
    assert 12 <= found < PAIRS
    same(train(tmp_path / "run", **flags), first[1])
    assert sum(asked) == PAIRS - found


def test_other_batches_are_close(train, first, tmp_path, asked):
    """Kept in batches of two pairs, read in batches of four: the errors differ by float32's
    rounding alone, 2^-22 of an error of about 1, and a loss of beta 500 by at most 250 times the
    sum of two."""
    flags = {**FLAGS, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    flags |= {"winner_preserving_scope": "pair", "adam_epsilon": 1.0}
    found = train(tmp_path / "found", **flags, cache_reference=first[0])
    assert not asked
    plain = train(tmp_path / "plain", **flags)
    for name, bound in (("ref_winner_mse", 2**-22), ("ref_loser_mse", 2**-22), ("loss", 2**-13)):
        assert found.column(name) == pytest.approx(plain.column(name), abs=bound, rel=0)


def test_several_processes_share_it(train, one, tmp_path):
    """Filled by two processes, each its part, and read by one."""
    flags = {**DIVIDED, "cache_reference": tmp_path / "kept"}
    two = train.processes(tmp_path / "two", 2, **flags, train_batch_size=2)
    paths, count = kept(tmp_path / "kept")
    assert len(paths) == 2 and count == 4 * 2 * 4
    assert len({path.stat().st_size for path in paths}) == 1
    base = base_unet(train.models["sd15"])
    check_close(two, one, base)
    check_close(train(tmp_path / "found", **flags, train_batch_size=4), one, base)
    assert kept(tmp_path / "kept")[1] == count


SETTINGS = {
    "schedule": ("scheduler/scheduler_config.json", "beta_end", 0.013),
    "settings": ("unet/config.json", "norm_eps", 0.1),
}


def changed_base(train, tmp_path, part):
    """A copy of the base of which one part has other weights, or another setting."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(train.models["sd15"], base)
    if setting := SETTINGS.get(part):
        file, name, value = setting
        text = (base / file).read_text()
        (base / file).write_text(re.sub(f'"{name}": [^,]*', f'"{name}": {value}', text))
        return base
    (file,) = (base / part).glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    weights[name] = weights[name] + 0.01
    save_file(weights, file, {"format": "pt"})
    return base


def relabelled(train, directory):
    """The pairs with the other image preferred."""
    directory.mkdir()
    for file in train.pairs.glob("train*.parquet"):
        table = pq.read_table(file)
        at = table.schema.get_field_index("label_0")
        turned = pa.array([1 - label for label in table["label_0"].to_pylist()], pa.float64())
        pq.write_table(table.set_column(at, "label_0", turned), directory / file.name)
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("vae", "another VAE, then of "),
        ("text_encoder", "other text encoders or tokenizers, then of "),
        ("schedule", "another noise schedule, then of "),
        ("settings", "another configuration of the reference, then --pretrained_model_name_or_"),
        ("unet", "another reference, then --pretrained_model_name_or_path "),
        ({"split": "heldout", "max_train_samples": None}, "other pairs, labels or captions, then"),
        ({"split": "heldout", "max_train_samples": None}, "other images, then of "),
        ("labels", "other pairs, labels or captions, then of "),
        ({"max_train_samples": 13}, "other pairs, labels or captions, then of "),
        ({"seed": 1}, "--seed 0 (this run: 1)"),
    ],
)
def test_a_stale_cache_is_refused(train, first, tmp_path, change, said):
    flags = {**FLAGS, "cache_reference": first[0]}
    if change == "labels":
        change = {"train_data_dir": relabelled(train, tmp_path / "pairs")}
    elif isinstance(change, str):
        change = {"pretrained_model_name_or_path": changed_base(train, tmp_path, change)}
    before = files(first[0])
    argv = train.argv(tmp_path / "run", **{**flags, **change})
    with pytest.raises(UserError) as raised:
        run_here("train.py", argv)
    assert f"--cache_reference: {first[0]} was made with " in str(raised.value)
    assert said in str(raised.value)
    assert files(first[0]) == before


def test_without_its_key_it_is_not_taken_for_anothers(train, first, tmp_path):
    shutil.copytree(first[0], tmp_path / "kept")
    (tmp_path / "kept/key.json").unlink()
    flags = {**FLAGS, "cache_reference": tmp_path / "kept"}
    with pytest.raises(UserError, match="was not made for what"):
        run_here("train.py", train.argv(tmp_path / "other", **flags, seed=1))
    assert not (tmp_path / "kept/key.json").exists()


def test_buckets_depend_on_the_batch(train, shaped_pairs, tmp_path):
    flags = {"train_data_dir": shaped_pairs, "resize": "bucket", "max_train_steps": 2}
    flags |= {"resolution": 64, "cache_reference": tmp_path / "kept"}
    run = train(tmp_path / "run", **flags)
    same(train(tmp_path / "again", **flags, train_method="diffusion-dpo"), run)
    with pytest.raises(UserError, match=r"2 pairs a step in all processes, .*\(this run: 1\)"):
        run_here("train.py", train.argv(tmp_path / "other", **flags, train_batch_size=1))


def test_without_room_the_run_goes_on(train, first, tmp_path, monkeypatch):
    """A cache that cannot be written to is read all the same, and costs no run."""
    shutil.copytree(first[0], tmp_path / "kept")
    before = files(tmp_path / "kept")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdpo.training.reference_cache.records.open", full, raising=False)
    flags = {**FLAGS, "max_train_steps": 6, "cache_reference": tmp_path / "kept"}
    run = train(tmp_path / "run", **flags)
    assert run.numbers[:5] == first[1].numbers
    assert files(tmp_path / "kept") == before
    assert distance(run.unet(), first[1].unet()) > 0

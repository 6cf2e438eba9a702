"""The reference's errors on disk: records that survive kills and damage, keys that tell runs."""

from __future__ import annotations

import json
import shutil
import zlib
from itertools import islice

import numpy as np
import pytest
import torch

from sdpo.common.errors import UserError
from sdpo.data.order import BucketOrder, PairOrder, Place, PlaceSampler
from sdpo.training.reference_cache.errors import CachedErrors
from sdpo.training.reference_cache.key import check_key, claim, key_digest, key_of_flags
from sdpo.training.reference_cache.records import RECORD, Records

SPOTS = [(0, 0), (0, 3), (2, 1)]
ERRORS = np.array([[1.5, 0.1], [2.0, 1e-30], [3e8, 0.3]], np.float32)
DIGEST = "0123456789abcdef"


def written(directory, spots=SPOTS, errors=ERRORS):
    """The one file of a writer that added these."""
    before = {*directory.iterdir()}
    Records(directory, DIGEST).add(spots, errors)
    (file,) = {*directory.iterdir()} - before
    return file


def test_what_was_written_is_read(tmp_path):
    file = written(tmp_path)
    assert file.stat().st_size == 20 * 3
    assert file.read_bytes()[16:20] == zlib.crc32(file.read_bytes()[:16]).to_bytes(4, "little")
    records = Records(tmp_path, DIGEST)
    assert np.array_equal(records.at(SPOTS[::-1]), ERRORS[::-1])
    for missing in [(0, 1), (1, 0), (0, 4), (2, 1000)]:
        assert records.at([SPOTS[0], missing]) is None
    assert records.has(0, 0, 1) and records.has(2, 1, 1)
    assert not records.has(0, 0, 2) and not records.has(1, 0, 1) and not records.has(2, 1, 2)


def test_errors_that_are_not_finite_are_not_kept(tmp_path):
    errors = np.array([[1, 2], [np.nan, 1], [1, np.inf]], np.float32)
    written(tmp_path, errors=errors)
    records = Records(tmp_path, DIGEST)
    assert records.at(SPOTS[:1]) is not None
    assert records.at(SPOTS[1:2]) is None and records.at(SPOTS[2:]) is None


@pytest.mark.parametrize("lost", [1, 7, 20, 59])
def test_a_torn_tail_costs_the_torn_records_alone(tmp_path, lost, caplog):
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-lost])
    records = Records(tmp_path, DIGEST)
    left = (60 - lost) // 20
    assert [records.at([spot]) is not None for spot in SPOTS] == [i < left for i in range(3)]
    assert not caplog.records
    # Whoever goes on writes to a file of its own.
    records.add(SPOTS[left:], ERRORS[left:])
    assert np.array_equal(Records(tmp_path, DIGEST).at(SPOTS), ERRORS)


@pytest.mark.parametrize("byte", [20, 25, 30, 37])
def test_a_damaged_record_is_told_and_taken_for_missing(tmp_path, byte, caplog):
    file = written(tmp_path)
    content = bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)
    records = Records(tmp_path, DIGEST)
    assert [records.at([spot]) is not None for spot in SPOTS] == [True, False, True]
    assert f"{file} is damaged: 1 of 3 errors in it are computed again" in caplog.text


def test_zeros_that_a_power_failure_left_are_no_records(tmp_path):
    (tmp_path / f"errors-{DIGEST}-0.bin").write_bytes(bytes(400))
    assert Records(tmp_path, DIGEST).at([(0, 0)]) is None


def test_a_file_that_cannot_be_read_is_told_once(tmp_path, caplog):
    written(tmp_path)
    odd = tmp_path / f"errors-{DIGEST}-0.bin"
    (odd / "x").mkdir(parents=True)
    records = Records(tmp_path, DIGEST)
    records.refresh()
    assert records.at(SPOTS) is not None
    assert caplog.text.count(f"{odd} cannot be read (Is a directory)") == 1


def test_files_of_another_key_are_refused(tmp_path):
    file = written(tmp_path)
    with pytest.raises(UserError, match=f"--cache_reference: {file} was not made for what"):
        Records(tmp_path, DIGEST[::-1])


def test_writers_see_each_other_s_records(tmp_path):
    one, other = Records(tmp_path, DIGEST), Records(tmp_path, DIGEST)
    for i, spot in enumerate(SPOTS):
        writer, reader = (one, other) if i % 2 else (other, one)
        writer.add([spot], ERRORS[i : i + 1])
        assert reader.at([spot]) is None
        reader.refresh()
        assert np.array_equal(reader.at([spot])[0], ERRORS[i])
    assert len([*tmp_path.iterdir()]) == 2


def test_a_place_without_room_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    records = Records(tmp_path, DIGEST)
    shutil.rmtree(tmp_path)
    for _ in range(2):
        records.add(SPOTS, ERRORS)
    assert caplog.text.count(f"cannot write to {tmp_path} (No such file or directory)") == 1


def keys(*places):
    return [(7, *place) for place in places]


def never():
    raise AssertionError("the reference was asked")


def test_errors_are_computed_once(tmp_path):
    cached = CachedErrors(Records(tmp_path, DIGEST), complete=False)
    batches = {((0, 0), (0, 1)): [1.0, 2.0, 3.0, 4.0], ((0, 2), (1, 0)): [5.0, 6.0, 7.0, 8.0]}
    for places, errors in batches.items():
        assert cached.of(keys(*places), lambda e=errors: torch.tensor(e)).tolist() == errors
    cached.write()
    cached.write()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 4 * RECORD.itemsize
    again = CachedErrors(Records(tmp_path, DIGEST), complete=True)
    # Winners first, in whatever batches they come.
    assert again.of(keys((0, 1), (1, 0), (0, 0)), never).tolist() == [2, 6, 1, 4, 8, 3]
    assert again.of(keys((0, 1)), never).dtype == torch.float32


def test_a_run_that_is_ahead_spares_another_the_computation(tmp_path):
    ahead, behind = (CachedErrors(Records(tmp_path, DIGEST), False) for _ in range(2))
    ahead.of(keys((0, 0)), lambda: torch.tensor([1.0, 2.0]))
    assert behind.of(keys((0, 0)), lambda: torch.tensor([3.0, 4.0])).tolist() == [3, 4]
    ahead.of(keys((0, 1)), lambda: torch.tensor([5.0, 6.0]))
    ahead.write()
    assert behind.of(keys((0, 1)), never).tolist() == [5, 6]


def test_processes_that_compute_together_do_so_unless_all_is_there(tmp_path):
    written(tmp_path)
    for complete in (False, True):
        cached = CachedErrors(Records(tmp_path, DIGEST), complete, alone=False)
        found = cached.of(keys(SPOTS[0]), lambda: torch.tensor([9.0, 9.0])).tolist()
        assert found == (ERRORS[0].tolist() if complete else [9.0, 9.0])


ORDERS = {
    "plain": PairOrder(11, 3, 4),
    "buckets": BucketOrder(11, 3, 2, np.array([0] * 5 + [1] * 5 + [2])),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("start", [Place(0, 0), Place(1, 3)])
def test_the_steps_of_an_order_are_those_of_its_batches(order, start):
    """`steps` says ahead what the processes will take, across the ends of epochs."""
    half = order.stride // 2
    samplers = [iter(PlaceSampler(order, half, rank, start)) for rank in (0, 1)]
    for place in islice(order.steps(start), 20):
        taken = [spot for sampler in samplers for spot in next(sampler)]
        assert taken == [Place(place.epoch, place.position + i) for i in range(order.stride)]


# Flags, and what is said of a cache that was made without them.
CHANGES = [
    ({"seed": 5}, "--seed 0 (this run: 5)"),
    ({"mixed_precision": "bf16"}, "--mixed_precision no (this run: bf16)"),
    ({"allow_tf32": True}, "--allow_tf32 False (this run: True)"),
    ({"resolution": 32}, "--resolution 64 (this run: 32)"),
    ({"resize": "bucket"}, "--resize crop (this run: bucket)"),
    ({"random_crop": True}, "--random_crop False (this run: True)"),
    ({"quantize_base": "4bit", "lora_rank": 2}, "--quantize_base None (this run: 4bit)"),
    ({"no_hflip": True}, "--no_hflip False (this run: True)"),
    ({"proportion_empty_prompts": 0.1}, "--proportion_empty_prompts 0.2 (this run: 0.1)"),
    ({"noise_offset": 0.1}, "--noise_offset 0.0 (this run: 0.1)"),
    ({"input_perturbation": 0.1}, "--input_perturbation 0.0 (this run: 0.1)"),
    ({"cache_dir_latents": "x"}, "encodings not kept (this run: kept in bf16)"),
]
FLOW = [
    ({"time_sampling": "uniform"}, "--time_sampling logit-normal (this run: uniform)"),
    ({"time_mean": 0.5}, "--time_mean 0.0 (this run: 0.5)"),
    ({"time_std": 2.0}, "--time_std 1.0 (this run: 2.0)"),
    ({"time_shift": 3.0}, "--time_shift None (this run: 3.0)"),
]


@pytest.mark.parametrize(("changed", "said"), [*CHANGES, *FLOW])
def test_flags_that_decide_the_errors_are_told_before_anything_is_loaded(
    make_config, tiny_sd3, tmp_path, changed, said
):
    base = {"pretrained_model_name_or_path": tiny_sd3} if (changed, said) in FLOW else {}
    claim(tmp_path / "kept", key_of_flags(make_config(**base)))
    with pytest.raises(UserError) as raised:
        make_config(**base, **changed, cache_reference=tmp_path / "kept")
    assert str(raised.value) == (
        f"--cache_reference: {tmp_path / 'kept'} was made with {said}; give another directory, or "
        "delete this one to have it made anew"
    )


def test_flags_that_do_not_decide_them_are_passed_over(make_config, tmp_path):
    key = key_of_flags(make_config())
    other = make_config(
        train_method="dmpo",
        beta_dpo=1.0,
        dmpo_alpha=0.1,
        use_winner_preserving=True,
        winner_preserving_mu=0.1,
        winner_preserving_scope="pair",
        winner_preserving_space="parameter",
        use_adafactor=True,
        learning_rate=1.0,
        train_batch_size=1,
        gradient_accumulation_steps=3,
        gradient_checkpointing=True,
        lora_rank=2,
        output_dir=tmp_path / "elsewhere",
    )
    assert key_of_flags(other) == key
    # What a rectified flow does where nothing is said is the same said.
    assert key_of_flags(make_config()) | {"time_mean": 0.0, "time_std": 1.0} == key


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"train_method": "dspo"}, "--train_method dspo takes its whole output"),
        ({"streaming": True}, "leave --streaming out"),
    ],
)
def test_what_it_cannot_serve_is_refused(make_config, tmp_path, flags, said):
    with pytest.raises(UserError, match=f"--cache_reference keeps .*{said}"):
        make_config(**flags, cache_reference=tmp_path)


def test_a_file_in_the_place_of_the_directory_is_refused(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache_reference: .* is not a directory"):
        make_config(cache_reference=tmp_path / "file")


def test_a_key_is_kept_whole(tmp_path):
    key = {"seed": 1, "reference": "abc", "made_of": {"reference": "base"}}
    assert not check_key(tmp_path / "kept", key)
    claim(tmp_path / "kept", key)
    claim(tmp_path / "kept", {**key, "made_of": {"reference": "the same elsewhere"}})
    assert check_key(tmp_path / "kept", {"seed": 1})
    other = {**key, "reference": "abd", "made_of": {"reference": "another"}}
    with pytest.raises(UserError, match=r"another reference, then base \(this run: another\)"):
        claim(tmp_path / "kept", other)
    assert key_digest(key) != key_digest(other)
    assert key_digest(key) == key_digest({**key, "made_of": {}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"key.json cannot be read \(.*\); delete .*kept to have it made anew"),
        ("[]", "key.json cannot be read"),
        ('{"format": 1}', "key.json cannot be read"),
        (json.dumps({"format": 9, "key": {}}), "a cache of format 9, this version reads 1"),
    ],
)
def test_a_key_that_cannot_be_read_is_refused(tmp_path, content, said):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/key.json").write_text(content)
    with pytest.raises(UserError, match=said):
        check_key(tmp_path / "kept", {"seed": 1})

"""Pairs by prompt and by index, and what is left over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo.common.errors import UserError
from sdpo.evaluation.compare.alignment import align
from sdpo.evaluation.generate.manifest import Entry, Manifest

PROMPTS = st.lists(st.sampled_from(["a", "b", "c", " c", ""]), min_size=1, max_size=12)


def manifest(prompts: list[str], name: str = "m") -> Manifest:
    return Manifest(
        Path(f"{name}.json"), [Entry(p, Path(f"{i}.png")) for i, p in enumerate(prompts)]
    )


def test_equal_prompts_meet_wherever_they_stand():
    found = align(manifest(["x", "y", "z"]), manifest(["z", "x", "y"]), "prompt")
    assert (found.rows_a, found.rows_b) == ([0, 1, 2], [1, 2, 0])
    assert not (found.unmatched_a or found.unmatched_b or found.differing)


def test_the_kth_occurrence_meets_the_kth():
    found = align(manifest(["x", "x", "y", "x"]), manifest(["y", "x", "x"]), "prompt")
    assert list(zip(found.rows_a, found.rows_b, strict=True)) == [(0, 1), (1, 2), (2, 0)]
    assert found.unmatched_a == [3]


def test_leftovers_of_both_sides_are_named():
    found = align(manifest(["only a", "both"]), manifest(["both", "only b", "both"]), "prompt")
    assert (found.unmatched_a, found.unmatched_b) == ([0], [1, 2])
    assert len(found) == 1


def test_prompts_are_compared_to_the_letter():
    with pytest.raises(UserError, match="no prompt in common"):
        align(manifest(["a cat "]), manifest(["a cat"]), "prompt")


def test_without_a_common_prompt_nothing_is_guessed():
    a, b = manifest(["x", "y"], "first"), manifest(["z", "w"], "second")
    with pytest.raises(UserError, match=r"first\.json and second\.json .* --align index"):
        align(a, b, "prompt")


def test_by_index_prompts_may_differ_and_are_reported():
    found = align(manifest(["x", "y", "z"]), manifest(["x", "Y", "w"]), "index")
    assert (found.rows_a, found.rows_b, found.differing) == ([0, 1, 2], [0, 1, 2], [1, 2])


def test_by_index_lengths_must_agree():
    with pytest.raises(UserError, match=r"--align index needs .* equal length: .* 2 images, .* 1"):
        align(manifest(["x", "y"]), manifest(["x"]), "index")


@settings(deadline=None)
@given(PROMPTS, PROMPTS)
def test_every_row_is_either_in_one_pair_or_left_over(a, b):
    expected = sum((Counter(a) & Counter(b)).values())
    if not expected:
        with pytest.raises(UserError):
            align(manifest(a), manifest(b), "prompt")
        return
    found = align(manifest(a), manifest(b), "prompt")
    assert len(found) == expected
    assert sorted(found.rows_a + found.unmatched_a) == list(range(len(a)))
    assert sorted(found.rows_b + found.unmatched_b) == list(range(len(b)))
    assert found.rows_a == sorted(found.rows_a)
    for i, j in zip(found.rows_a, found.rows_b, strict=True):
        assert a[i] == b[j]
        assert a[:i].count(a[i]) == b[:j].count(b[j])


@settings(deadline=None)
@given(PROMPTS, PROMPTS)
def test_swapping_the_sides_swaps_the_pairs(a, b):
    if not set(a) & set(b):
        return
    there, back = (
        align(manifest(a), manifest(b), "prompt"),
        align(manifest(b), manifest(a), "prompt"),
    )
    pairs = set(zip(there.rows_a, there.rows_b, strict=True))
    assert pairs == set(zip(back.rows_b, back.rows_a, strict=True))
    assert (there.unmatched_a, there.unmatched_b) == (back.unmatched_b, back.unmatched_a)

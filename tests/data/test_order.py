"""Positions and permutations: what a step takes, over ranks and after a resume."""

from __future__ import annotations

from itertools import islice

import pytest

from sdpo.common.errors import UserError
from sdpo.data.order import FIRST, PairOrder, Place, PlaceSampler, epoch_permutation


def sampler(size, batch_size, rank, world, start=FIRST):
    return PlaceSampler(PairOrder(size, 0, batch_size * world), batch_size, rank, start)


def test_an_epoch_is_a_permutation_of_its_own():
    orders = {
        (seed, epoch): epoch_permutation(50, seed, epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    epoch_permutation.cache_clear()
    assert epoch_permutation(50, 0, 1).tolist() == orders[0, 1]


def test_batches_of_one_process():
    taken = list(islice(sampler(10, 3, 0, 1), 4))
    assert taken[0] == [Place(0, 0), Place(0, 1), Place(0, 2)]
    assert taken[2] == [Place(0, 6), Place(0, 7), Place(0, 8)]
    assert taken[3] == [Place(1, 0), Place(1, 1), Place(1, 2)]
    assert PairOrder(10, 0, 3).steps_before(1) == 3
    assert PairOrder(9, 0, 3).steps_before(1) == 3


@pytest.mark.parametrize("size", [12, 13, 23])
@pytest.mark.parametrize(("batch_size", "world"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_ranks_share_out_what_one_process_would_take(size, batch_size, world):
    alone = list(islice(sampler(size, 6, 0, 1), 9))
    ranks = [list(islice(sampler(size, batch_size, r, world), 9)) for r in range(world)]
    together = [[place for rank in ranks for place in rank[step]] for step in range(9)]
    assert together == alone


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_resuming_goes_on_identically(steps):
    whole = list(islice(sampler(11, 2, 1, 2), 12))
    epoch, position = whole[steps - 1][0]
    # The place after a step is the next position of rank 0, be it at the epoch's end.
    place = Place(epoch, position - 2 + 4)
    assert list(islice(sampler(11, 2, 1, 2, place), 12 - steps)) == whole[steps:]


def test_start_is_the_first_place():
    assert next(iter(sampler(4, 2, 0, 1, FIRST))) == [Place(0, 0), Place(0, 1)]


def test_too_little_data_is_refused():
    assert PairOrder(8, 0, 8).steps_before(1) == 1
    with pytest.raises(UserError, match=r"7 usable pairs.*\(8\).*--train_batch_size"):
        PairOrder(7, 0, 8)

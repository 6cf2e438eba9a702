"""--resize bucket: which shape a pair gets, what is cut away, and what a step is made of."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from sdpo.common.errors import UserError
from sdpo.data.buckets import bucket_shapes, choose_shapes, in_buckets, shape_of_row
from sdpo.data.loader import PairLoader
from sdpo.data.order import FIRST, BucketOrder, Place, PlaceSampler
from sdpo.data.source import open_pairs
from sdpo.data.transforms import PairTransform

SIZES = {"wide": (96, 54), "tall": (54, 96), "square": (64, 64)}
SHAPES = {"wide": (88, 48), "tall": (48, 88), "square": (64, 64)}


@pytest.mark.parametrize(
    ("resolution", "step"), [(512, 64), (1024, 64), (768, 64), (600, 64), (256, 32), (64, 8)]
)
def test_shapes_are_about_the_square_s_area(resolution, step):
    shapes = bucket_shapes(resolution)
    assert (resolution, resolution) in shapes
    assert {(h, w) for w, h in shapes} == set(shapes)
    ratios = [w / h for w, h in shapes]
    assert ratios == sorted(set(ratios))
    assert ratios[-1] <= 4
    for shape in shapes:
        if shape[0] != shape[1]:
            assert shape[0] % step == shape[1] % step == 0
        assert math.prod(shape) / resolution**2 == pytest.approx(1, abs=0.1)


def test_shapes_at_1024_are_sdxl_s():
    """Appendix I's table, its part between 1 : 4 and 4 : 1 (height by width)."""
    table = set()
    for height, widths in {
        512: (2048, 1984),
        576: (1920, 1856, 1792, 1728),
        640: (1664, 1600),
        704: (1536, 1472),
        768: (1408, 1344),
        832: (1280, 1216),
        896: (1152,),
        960: (1088,),
        1024: (1024,),
    }.items():
        table |= {(width, height) for width in widths}
    assert set(bucket_shapes(1024)) == table | {(h, w) for w, h in table}


def test_the_nearest_shape_is_chosen():
    chance = np.random.default_rng(0)
    sizes = chance.integers(20, 3000, (200, 2, 2))
    found = choose_shapes(sizes, 512)
    for (first, second), shape in zip(sizes.tolist(), found.tolist(), strict=True):
        # The geometric mean of the two ratios.
        ratio = math.sqrt(first[0] / first[1] * second[0] / second[1])
        best = min(max(w / h / ratio, ratio * h / w) for w, h in bucket_shapes(512))
        assert max(shape[0] / shape[1] / ratio, ratio * shape[1] / shape[0]) == pytest.approx(best)


def test_images_that_cannot_be_read_do_not_choose():
    none = (0, 0)
    sizes = np.array(
        [[(96, 54), none], [none, (54, 96)], [none, none], [(2, 1), (1, 2)], [(54, 96)] * 2]
    )
    wide, tall, unknown, both, also = choose_shapes(np.array(sizes), 64).tolist()
    assert tuple(wide) == SHAPES["wide"]
    assert tuple(tall) == tuple(also) == SHAPES["tall"]
    assert tuple(unknown) == SHAPES["tall"]  # the most common
    assert tuple(both) == (64, 64)
    assert choose_shapes(np.zeros((2, 2, 2), int), 64).shape == (2, 2)


@pytest.mark.parametrize("shape", [(64, 64), (88, 48), (40, 96)])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (88, 48), (1000, 40), (41, 977)])
@pytest.mark.parametrize("flip", [False, True])
def test_what_sdxl_is_told_is_where_the_crop_lies(shape, size, flip):
    """Ramps along both axes, so that a pixel's value says where in the picture it was."""
    along = np.linspace(0, 255, size[0])[None].repeat(size[1], 0)
    across = np.linspace(0, 255, size[1])[:, None].repeat(size[0], 1)
    image = Image.fromarray(np.stack([along, across, 0 * along], -1).round().astype(np.uint8))
    transform = PairTransform(64, random_crop=True, hflip=True)
    keys = [(0, 0, i) for i in range(60) if transform.flips((0, 0, i)) == flip][:4]
    for key in keys:
        height, width, top, left, *target = transform.told(size, key, shape)
        assert (width, height) == size
        assert target == [shape[1], shape[0]]
        pixels, other = transform(image, image, key, shape)
        assert torch.equal(pixels, other)
        assert pixels.shape == (3, shape[1], shape[0])
        scale = max(shape[0] / size[0], shape[1] / size[1])
        resized = [max(least, round(side * scale)) for side, least in zip(size, shape, strict=True)]
        assert (shape[0] == resized[0]) or (shape[1] == resized[1])
        assert 0 <= left <= resized[0] - shape[0]
        assert 0 <= top <= resized[1] - shape[1]
        found = (pixels[:2].double() + 1) * 127.5
        if flip:
            found[0] = 255 - found[0]  # as if the whole picture had been turned
        places = [left + shape[0] / 2, top + shape[1] / 2]
        for channel, place in enumerate(places):
            middle = found[channel].mean().item() / 255 * resized[channel]
            assert middle == pytest.approx(place, abs=1 + 0.01 * resized[channel])


def members(order):
    return {bucket: set(rows.tolist()) for bucket, rows in order.members.items()}


def make_order(counts, stride, seed=0):
    buckets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return BucketOrder(len(buckets), seed, stride, buckets)


def epoch_of(order, epoch):
    return [order.row(Place(epoch, p)) for p in range(order.positions(epoch))]


@pytest.mark.parametrize("counts", [(20, 7, 1), (3, 3, 3), (8, 16, 4), (30,)])
@pytest.mark.parametrize("stride", [4, 6])
def test_a_step_is_of_one_bucket_and_no_pair_is_lost(counts, stride):
    order = make_order(counts, stride)
    seen, queues, steps = Counter(), dict.fromkeys(members(order), 0), 0
    for epoch in range(3 * stride):
        rows = epoch_of(order, epoch)
        groups = [rows[i : i + stride] for i in range(0, len(rows), stride)]
        assert all(len({int(order.buckets[row]) for row in group}) == 1 for group in groups)
        # Another way to the same numbers: each epoch puts a bucket's pairs into its queue, of which
        # full steps are taken.
        found = Counter(int(order.buckets[group[0]]) for group in groups)
        for bucket, rows_of_bucket in order.members.items():
            queues[bucket] += len(rows_of_bucket)
            assert found[int(bucket)] == queues[bucket] // stride
            queues[bucket] %= stride
        assert order.steps_before(epoch) == steps
        steps += len(groups)
        seen.update(rows)
    # After a multiple of `stride` epochs nothing is carried over.
    assert order.steps_before(3 * stride) == steps
    assert set(seen) == set(range(sum(counts)))
    assert set(seen.values()) == {3 * stride}


def test_after_each_epoch_pairs_were_seen_about_as_often():
    order = make_order((21, 33), 4)
    seen: Counter[int] = Counter()
    for epoch in range(5):
        rows = epoch_of(order, epoch)
        seen.update(rows)
        times = Counter(seen[row] for row in range(54))
        # Less than a step of each bucket is behind.
        assert set(times) <= {epoch, epoch + 1}
        assert times[epoch] == sum((epoch + 1) * count % 4 for count in (21, 33))


def test_bucket_order_is_a_function_of_seed_and_epoch():
    orders = {(s, e): epoch_of(make_order((20, 12), 4, s), e) for s in (0, 1) for e in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_of(make_order((20, 12), 4), 1) == orders[0, 1]
    kinds = [make_order((20, 12), 4).buckets[row] for row in orders[0, 0][::4]]
    assert kinds != sorted(kinds), "steps of all buckets are shuffled"


@pytest.mark.parametrize("done", [1, 3, 5, 8])
def test_ranks_and_resuming_in_buckets(done):
    order = make_order((5, 9, 3), 4)
    alone = list(islice(PlaceSampler(order, 4, 0), 12))
    ranks = [list(islice(PlaceSampler(order, 2, rank), 12)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    epoch, position = alone[done - 1][0]
    rest = islice(PlaceSampler(order, 4, 0, Place(epoch, position + 4)), 12 - done)
    assert list(rest) == alone[done:]


@pytest.mark.parametrize("position", [4, 5, 7, 8])
def test_going_on_in_steps_of_another_size(position):
    order = make_order((12, 12), 4)
    for places in islice(PlaceSampler(order, 4, 0, Place(1, position)), 8):
        assert len({int(order.buckets[order.row(place)]) for place in places}) == 1
        assert places[0].position % 4 == 0


def test_epochs_without_a_step_are_passed_over():
    order = make_order((3, 2), 4)
    assert order.positions(0) == 0
    first = next(iter(PlaceSampler(order, 4, 0)))
    assert first[0] == Place(1, 0)


def encoded(number, side, size, fmt="PNG"):
    """An image whose red says which row it is of and whose green says whose side."""
    image = Image.new("RGB", size, (10 * number, 255 * side, 0))
    buffer = io.BytesIO()
    image.save(buffer, fmt)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def kinds():
    """The shape of each row's images."""
    return ["wide", "tall", "square", "wide", "tall", "wide", "wide", "square", "tall", "wide"]


@pytest.fixture
def directory(kinds, make_parquet):
    """`directory(bad=())`: rows of these shapes, image 0 preferred in even ones."""

    def write(bad=(), kinds=kinds):
        rows = []
        for i, kind in enumerate(kinds):
            won, lost = (encoded(i, side, SIZES[kind]) for side in (1, 0))
            if i in bad:
                lost = lost[:-30]  # its header is whole
            sides = (won, lost) if i % 2 == 0 else (lost, won)
            label = float(i % 2 == 0)
            rows.append({"jpg_0": sides[0], "jpg_1": sides[1], "label_0": label, "caption": f"{i}"})
        return make_parquet(rows, shards=2)

    return write


@pytest.fixture
def make_loader(make_config):
    """`make_loader(directory, rank=0, world=1, start=FIRST, **flags)`."""

    def make(path, rank=0, world=1, start=FIRST, **flags):
        flags = {"resize": "bucket", "proportion_empty_prompts": 0, **flags}
        config = make_config(train_data_dir=path, max_bad_fraction=1.0, **flags)
        return PairLoader(open_pairs(config.data, config.run.seed), config, rank, world, start)

    return make


def take(loader, count):
    return list(islice(iter(loader), count))


def test_batches_are_of_one_shape(make_loader, directory, kinds):
    seen = Counter()
    for batch in take(make_loader(directory(), random_crop=True), 20):
        (kind,) = {kinds[int(caption)] for caption in batch.captions}
        width, height = SHAPES[kind]
        assert batch.pixels.shape == (4, 3, height, width)
        red, green, _ = ((batch.pixels.mean((2, 3)) + 1) * 127.5).round().T
        assert green.tolist() == [255, 255, 0, 0]
        assert red.tolist() == [10 * int(caption) for caption in batch.captions] * 2
        original = SIZES[kind][::-1]
        assert [tuple(row) for row in batch.sizes[:, [0, 1]].tolist()] == [original] * 4
        assert [tuple(row) for row in batch.sizes[:, [4, 5]].tolist()] == [(height, width)] * 4
        seen.update(batch.captions)
    assert set(seen) == {str(i) for i in range(10)}


def test_crop_has_no_sizes(make_loader, directory):
    (batch,) = take(make_loader(directory(), resize="crop"), 1)
    assert batch.pixels.shape == (4, 3, 64, 64)
    assert batch.sizes is None


def same(batch, other):
    return (
        torch.equal(batch.pixels, other.pixels)
        and torch.equal(batch.sizes, other.sizes)
        and batch.captions == other.captions
        and batch.keys == other.keys
        and batch.bad_rows == other.bad_rows
    )


def test_workers_ranks_and_resuming(make_loader, directory):
    path = directory(bad={3})
    whole = take(make_loader(path, train_batch_size=4, random_crop=True), 9)
    workers = take(
        make_loader(path, train_batch_size=4, random_crop=True, dataloader_num_workers=2), 9
    )
    assert all(same(a, b) for a, b in zip(whole, workers, strict=True))
    loaders = [make_loader(path, rank, 2, random_crop=True) for rank in range(2)]
    ranks = [take(loader, 9) for loader in loaders]
    for alone, first, second in zip(whole, *ranks, strict=True):
        parts = [first.pixels[:2], second.pixels[:2], first.pixels[2:], second.pixels[2:]]
        assert torch.equal(torch.cat(parts), alone.pixels)
        parts = [first.sizes[:2], second.sizes[:2], first.sizes[2:], second.sizes[2:]]
        assert torch.equal(torch.cat(parts), alone.sizes)
        assert first.keys + second.keys == alone.keys
    for done in (2, 5):
        start = loaders[1].place_after(ranks[1][done - 1])
        rest = take(make_loader(path, 1, 2, start, random_crop=True), 9 - done)
        assert all(same(a, b) for a, b in zip(rest, ranks[1][done:], strict=True))


def test_a_bad_row_is_replaced_by_one_of_its_bucket(make_loader, directory, kinds):
    loader = make_loader(directory(bad={3, 6}))
    for batch in take(loader, 15):
        assert len({kinds[int(caption)] for caption in batch.captions}) == 1
        assert not {"3", "6"} & set(batch.captions)
    assert loader.counter.rows == {3, 6}


def test_a_bucket_of_bad_rows_alone_is_filled_from_others(make_loader, directory):
    kinds = ["wide"] * 5 + ["tall"]
    loader = make_loader(directory(bad={5}, kinds=kinds))
    shapes = {tuple(batch.pixels.shape[2:]) for batch in take(loader, 12)}
    assert shapes == {(48, 88), (88, 48)}
    assert loader.counter.rows == {5}


def test_steps_of_epochs(make_loader, directory):
    # 5 wide, 3 tall, 2 square.
    for epochs, steps in ((1, 2 + 1 + 1), (2, 5 + 3 + 2), (3, 7 + 4 + 3)):
        assert make_loader(directory(), num_train_epochs=epochs).max_train_steps == steps
    loader = make_loader(directory(), num_train_epochs=1, train_batch_size=6)
    with pytest.raises(UserError, match=r"--resize bucket: no bucket has .*\(6\).*batch_size"):
        _ = loader.max_train_steps
    with pytest.raises(UserError, match=r"10 usable pairs.*\(11\)"):
        make_loader(directory(), train_batch_size=11)


def test_sizes_are_read_once(make_config, directory, tmp_path, monkeypatch):
    import sdpo.data.buckets

    config = make_config(
        train_data_dir=directory(), resize="bucket", cache_dir=tmp_path, max_train_samples=8
    )
    first = in_buckets(open_pairs(config.data, 0), config.data)
    assert len(first.shapes.shapes) == 8
    monkeypatch.setattr(sdpo.data.buckets, "image_size", None)
    again = in_buckets(open_pairs(config.data, 0), config.data)
    assert np.array_equal(first.shapes.sizes, again.shapes.sizes)
    assert np.array_equal(first.shapes.shapes, again.shapes.shapes)
    assert in_buckets(again, config.data) is again
    crop = replace(config.data, resize="crop")
    assert in_buckets(open_pairs(crop, 0), crop).shapes is None


@pytest.mark.parametrize("kind", ["paths", "images"])
def test_shapes_of_paths_and_images(make_config, kinds, tmp_path, kind):
    import datasets

    rows = []
    for i, name in enumerate(kinds):
        for side in (0, 1):
            (tmp_path / f"{i}-{side}.webp").write_bytes(encoded(i, side, SIZES[name], "WEBP"))
        rows.append({"chosen": f"{i}-1.webp", "rejected": f"{i}-0.webp", "prompt": str(i)})
    if kind == "images":
        for row in rows:
            for name in ("chosen", "rejected"):
                row[name] = {"bytes": (tmp_path / row[name]).read_bytes(), "path": None}
    table = datasets.Dataset.from_list(rows)
    if kind == "images":
        for name in ("chosen", "rejected"):
            table = table.cast_column(name, datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    config = make_config(train_data_dir=tmp_path, resize="bucket")
    source = in_buckets(open_pairs(config.data, 0), config.data)
    found = [source.shape_of(i) for i in range(len(kinds))]
    assert found == [SHAPES[name] for name in kinds]
    assert source.row(1)["shape of the pair"] == SHAPES["tall"]
    assert [shape_of_row(source.rows[i], source, 64) for i in range(3)] == found[:3]


def test_streams_are_refused(make_config):
    with pytest.raises(UserError, match=r"--resize bucket orders pairs .* leave --streaming out"):
        make_config(resize="bucket", streaming=True)

from __future__ import annotations

import numpy as np
import pytest

from sdpo.tinyworld import world


def scenes(n: int = 2000, seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng) for _ in range(n)]


def test_caption_round_trip() -> None:
    for scene in scenes():
        description = world.describe(scene)
        assert world.parse_caption(world.caption(scene)) == description
        assert description.text == world.caption(scene)


def test_every_description_round_trips_and_differs() -> None:
    everything = world.all_descriptions()
    texts = [description.text for description in everything]
    assert len(set(texts)) == len(texts) == 5256
    assert [world.parse_caption(text) for text in texts] == everything


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a pink circle at the center on a white background",
        "a red circle at the top on a white background",
        "a red circle above a blue square",
        "a red circle at the center on a red background",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        world.parse_caption(text)


def test_parsing_ignores_case_and_white_space() -> None:
    parsed = world.parse_caption("  A red  circle at the top LEFT\non a white background ")
    assert parsed == world.Description("white", (("red", "circle"),), "top left")


def test_scenes_and_images_are_determined_by_the_seed() -> None:
    first, again, other = scenes(50, seed=3), scenes(50, seed=3), scenes(50, seed=4)
    assert first == again
    assert first != other
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(world.render_array(a), world.render_array(b))


def test_scenes_cover_the_whole_vocabulary() -> None:
    words = {word for scene in scenes() for word in world.caption(scene).split()}
    assert words == set(world.vocabulary())


def test_two_objects_share() -> None:
    rng = np.random.default_rng(0)
    assert {len(world.sample_scene(rng, 0.0).objects) for _ in range(100)} == {1}
    assert {len(world.sample_scene(rng, 1.0).objects) for _ in range(100)} == {2}


def test_two_objects_of_a_scene_never_look_alike() -> None:
    for scene in scenes():
        looks = world.describe(scene).objects
        assert len(set(looks)) == len(looks)


def test_objects_keep_apart_and_inside() -> None:
    for scene in scenes():
        covers = [world.coverage(o.shape, o.x, o.y, o.radius) > 0 for o in scene.objects]
        for cover in covers:
            assert not cover[0].any() and not cover[-1].any()
            assert not cover[:, 0].any() and not cover[:, -1].any()
        if len(covers) == 2:
            rows, columns = (np.nonzero(cover) for cover in covers)
            gap = np.abs(np.subtract.outer(rows[0], columns[0]))
            side = np.abs(np.subtract.outer(rows[1], columns[1]))
            assert np.maximum(gap, side).min() > 2


def test_coverage_is_antialiased_with_the_right_area_and_centroid() -> None:
    centres = np.arange(64) + 0.5
    for shape, area in (("circle", np.pi), ("square", 4 * 0.886**2), ("triangle", 2.3676)):
        cover = world.coverage(shape, 30.3, 33.6, 9.0)
        assert ((cover > 0) & (cover < 1)).any()
        assert cover.sum() == pytest.approx(area * 81, rel=0.01)
        assert (cover.sum(0) @ centres) / cover.sum() == pytest.approx(30.3, abs=0.1)
        assert (cover.sum(1) @ centres) / cover.sum() == pytest.approx(33.6, abs=0.1)


def test_coverage_off_the_image_is_empty_and_unknown_shapes_are_refused() -> None:
    assert world.coverage("circle", -50.0, 20.0, 9.0).sum() == 0
    with pytest.raises(ValueError, match="unknown shape"):
        world.coverage("star", 32.0, 32.0, 9.0)


def test_rendering_shows_the_palette() -> None:
    scene = world.Scene("brown", (world.SceneObject("cyan", "square", 20.0, 44.0, 9.0),))
    image = world.render(scene)
    assert image.size == (64, 64) and image.mode == "RGB"
    assert image.getpixel((20, 44)) == world.OBJECT_COLOURS["cyan"]
    assert image.getpixel((44, 20)) == world.BACKGROUND_COLOURS["brown"]
    assert world.caption(scene) == "a cyan square at the bottom left on a brown background"


def test_palette_colours_are_far_apart() -> None:
    palette = np.array([*world.OBJECT_COLOURS.values(), *world.BACKGROUND_COLOURS.values()], float)
    distances = np.linalg.norm(palette[:, None] - palette, axis=2)
    assert distances[~np.eye(len(palette), dtype=bool)].min() > 90


def test_relations_are_named_from_the_first_object() -> None:
    assert world.relation_name(30, 10, 32, 40) == "above"
    assert world.relation_name(32, 40, 30, 10) == "below"
    assert world.relation_name(10, 30, 40, 32) == "left of"
    assert world.relation_name(40, 32, 10, 30) == "right of"


def test_wrong_attribute_changes_exactly_one_thing_and_no_position() -> None:
    rng = np.random.default_rng(7)
    for scene in scenes(500):
        wrong = world.wrong_attribute(scene, rng)
        before, after = world.describe(scene), world.describe(wrong)
        flat = [
            [d.background, *(word for look in d.objects for word in look)] for d in (before, after)
        ]
        assert sum(a != b for a, b in zip(*flat, strict=True)) == 1
        assert before.placement == after.placement
        for a, b in zip(scene.objects, wrong.objects, strict=True):
            assert (a.x, a.y, a.radius) == (b.x, b.y, b.radius)


def test_degrade_is_deterministic_and_grows_with_strength() -> None:
    image = world.render(scenes(1)[0])
    pixels = np.asarray(image, float)
    errors = []
    for strength in (0.0, 0.5, 1.0, 2.0):
        spoilt = world.degrade(image, np.random.default_rng(5), strength)
        again = world.degrade(image, np.random.default_rng(5), strength)
        assert np.array_equal(np.asarray(spoilt), np.asarray(again))
        errors.append(np.abs(np.asarray(spoilt, float) - pixels).mean())
    assert errors[0] == 0.0
    assert errors[0] < errors[1] < errors[2] < errors[3]
    with pytest.raises(ValueError, match="negative"):
        world.degrade(image, np.random.default_rng(5), -0.1)


def test_evaluation_prompts_are_different_fixed_and_mixed() -> None:
    prompts = world.evaluation_prompts(200, seed=1)
    assert len(set(prompts)) == 200
    assert prompts == world.evaluation_prompts(200, seed=1)
    assert prompts != world.evaluation_prompts(200, seed=2)
    assert sum(len(world.parse_caption(p).objects) == 2 for p in prompts) == 100


@pytest.mark.parametrize("n", [0, -1, 721])
def test_impossible_numbers_of_prompts_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="number of prompts"):
        world.evaluation_prompts(n)


def test_invalid_scenes_are_refused() -> None:
    item = world.SceneObject("red", "circle", 32.0, 32.0, 9.0)
    with pytest.raises(ValueError, match="background"):
        world.Scene("pink", (item,))
    with pytest.raises(ValueError, match="one or two objects"):
        world.Scene("white", ())
    with pytest.raises(ValueError, match="colour"):
        world.SceneObject("pink", "circle", 32.0, 32.0, 9.0)
    with pytest.raises(ValueError, match="shape"):
        world.SceneObject("red", "star", 32.0, 32.0, 9.0)
